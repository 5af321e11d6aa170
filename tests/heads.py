"""Random heads for the tests of the kernel."""

from __future__ import annotations

import dataclasses
import math

import torch
from posttrain_kernels import Head, head_stats
from torch import Tensor

N, V = 45, 700


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


def cast(head: Head, dtype: torch.dtype, *, x: bool = True, weight: bool = True) -> tuple[Head, list[Tensor]]:
    """A copy whose tensors are leaves of `dtype`, and those of them that want gradients: hidden states, weights or both."""

    def leaf(tensor: Tensor | None, grad: bool) -> Tensor | None:
        return None if tensor is None else tensor.detach().to(dtype).clone().requires_grad_(grad)

    extra = tuple((leaf(a, x), leaf(b, weight)) for a, b in head.extra)
    temperature = head.temperature.to(dtype) if isinstance(head.temperature, Tensor) else head.temperature
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
    parts = [(v.double() * normal(*v.shape, seed=i)).sum() for i, v in enumerate(out.values()) if v.requires_grad]
    gradients = torch.autograd.grad(sum(parts), leaves) if leaves else []
    return {name: value.detach() for name, value in out.items()}, list(gradients)
