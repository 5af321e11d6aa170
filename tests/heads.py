"""Random heads for the tests of the kernel."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from posttrain_kernels import ONE_HEAD, Head, Separable, head_stats
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from posttrain.divergences import divergence

N, V = 45, 700
DIVERGENCES = ["forward_kl", "reverse_kl", *(Separable(d, divergence(d).summand) for d in ("js", "alpha:0.3", "jeffreys"))]
EVERYTHING = [*ONE_HEAD, "ref_logp", "ref_lse", *DIVERGENCES]
TINY = 1
"""A workspace that makes every tile and block as small as they get: 64 items, 32 tokens."""

OPTIONS = {
    "plain": {},
    "bias of -inf": {"bias": True},
    "soft-cap": {"softcap": 3.0},
    "scale": {"scale": 0.3},
    "temperature": {"temperature": 0.7},
    "temperature of one number": {"temperature": torch.tensor(1.7)},
    "temperature per token": {"temperature": torch.linspace(0.5, 2, N, dtype=torch.float64)},
    "extra terms": {"extra": True},
    "logical vocabulary": {"vocab": 650},
    "all": {
        "extra": True,
        "bias": True,
        "softcap": 4.0,
        "scale": 0.6,
        "temperature": torch.linspace(0.5, 2, N, dtype=torch.float64),
        "vocab": 690,
    },
}


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def policy(*, extra: bool = False, bias: bool = False, n: int = N, v: int = V, h: int = 12, **options) -> Head:
    terms = ((normal(n, 3, seed=3), normal(v, 3, seed=4)),) if extra else ()
    offsets = None
    if bias:
        offsets = normal(v, seed=5)
        offsets[[0, 70, v - 1]] = -math.inf
    return Head(normal(n, h, seed=1), normal(v, h, seed=2), terms, offsets, **options)


def reference(n: int = N, v: int = V, **options) -> Head:
    return Head(normal(n, 20, seed=6), normal(v, 20, seed=7, scale=0.7), **options)


def ids(n: int = N, high: int = V, k: int | None = None, seed: int = 8) -> Tensor:
    """Ids that no bias removes; of K, the second repeats the first."""
    drawn = torch.randint(1, min(high, V) - 1, (n, k or 1), generator=torch.Generator().manual_seed(seed))
    drawn[drawn == 70] = 71
    if k is None:
        return drawn.squeeze(1)
    drawn[:, 1] = drawn[:, 0]
    return drawn


def cast(
    head: Head, dtype: torch.dtype, *, x: bool = True, weight: bool = True, device: str = "cpu"
) -> tuple[Head, list[Tensor]]:
    """A copy whose tensors are leaves of `dtype`, and those of them that want gradients: hidden states, weights or both."""

    def leaf(tensor: Tensor | None, grad: bool) -> Tensor | None:
        return None if tensor is None else tensor.detach().to(device, dtype).clone().requires_grad_(grad)

    extra = tuple((leaf(a, x), leaf(b, weight)) for a, b in head.extra)
    temperature = head.temperature.to(device, dtype) if isinstance(head.temperature, Tensor) else head.temperature
    made = dataclasses.replace(
        head,
        x=leaf(head.x, x),
        weight=leaf(head.weight, weight),
        extra=extra,
        bias=leaf(head.bias, weight),
        temperature=temperature,
    )
    tensors = [made.bias, *(tensor for term in made.terms for tensor in term)]
    return made, [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]


def values_and_gradients(head: Head, leaves: list[Tensor], want: list, **arguments) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Statistics, and gradients of a random combination of them."""
    out = head_stats(head, want, **arguments)
    parts = [(v.double() * normal(*v.shape, seed=i).to(v.device)).sum() for i, v in enumerate(out.values()) if v.requires_grad]
    gradients = torch.autograd.grad(sum(parts), leaves) if leaves else []
    return {name: value.detach() for name, value in out.items()}, list(gradients)


def assert_equal_to_dense(
    head: Head,
    want: list,
    dtype: torch.dtype,
    *,
    workspace: int | None = None,
    ref: Head,
    eager: str | None = None,
    keep: int = 0,
    impl: str = "chunked",
    device: str = "cpu",
    **needs: bool,
) -> None:
    arguments = {
        "target": ids(head.x.shape[0], min(head.size, ref.size)),
        "index": ids(head.x.shape[0], head.size, k=4, seed=9),
    }
    exact, leaves = cast(head, torch.float64, **needs)
    truth, slopes = values_and_gradients(exact, leaves, want, impl="dense", ref=ref, **arguments)
    ours, leaves = cast(head, dtype, device=device, **needs)
    arguments = {name: its.to(device) for name, its in arguments.items()} | {"ref": cast(ref, dtype, device=device)[0]}
    got, gradients = values_and_gradients(
        ours, leaves, want, impl=impl, workspace=workspace, eager=eager, keep=keep, **arguments
    )
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert list(got) == list(truth)
    for name, value in got.items():
        assert value.dtype == (torch.int64 if name == "argmax" else dtype)
        torch.testing.assert_close(value.cpu().double(), truth[name].double(), rtol=tolerance, atol=tolerance)
    for gradient, slope, leaf in zip(gradients, slopes, leaves, strict=True):
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape
        assert (gradient.cpu() - slope).norm() <= tolerance * slope.norm()


def stats_and_gradients(n: int, v: int, want: list, workspace: int, *, frozen: bool, eager: str | None = None) -> Callable:
    """A call whose memory is of interest: float32, forward and backward of a sum of statistics."""
    head, leaves = cast(policy(n=n, v=v, h=16), torch.float32, weight=not frozen)
    ref = cast(reference(n, v), torch.float32, x=False, weight=False)[0]

    def call() -> tuple[Tensor, ...]:
        out = head_stats(head, want, target=ids(n), ref=ref, workspace=workspace, eager=eager)
        return torch.autograd.grad(sum(value.sum() for value in out.values()), leaves)

    return call


def peak_bytes(call: Callable[[], object]) -> int:
    """High water of what a call allocates, its results included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak
