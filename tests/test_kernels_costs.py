"""Costs over several tokens of two models equal the dense definition, in value and gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from heads import OPTIONS, TINY, N, V, cast, ids, normal, peak_bytes, policy, reference
from posttrain_kernels import Head, Separable, head_stats, l1_cost, span_cost
from posttrain_kernels.dense import dense_l1_cost, dense_span_cost
from torch import Tensor

M = 31
FIRST, SECOND = ids(60, N, seed=30), ids(60, N, seed=31)
"""Pairs of tokens, some of them several times."""

Form = Callable[..., Tensor]
PAIRS = {
    "l1": (l1_cost, dense_l1_cost, lambda head, v=V: (head, reference(M, v))),
    "span": (span_cost, dense_span_cost, lambda head, v=V: (head, reference(N, v), FIRST, SECOND)),
}
costs = pytest.mark.parametrize("name", PAIRS)


def value_and_gradients(cost: Form, leaves: list[Tensor], arguments: tuple, **options: int) -> tuple[Tensor, list[Tensor]]:
    """A cost in units that make it about 1, and the gradients of a random combination."""
    out = cost(*arguments, **options)
    out = out / out.detach().abs().max()
    return out.detach(), list(torch.autograd.grad((out * normal(*out.shape, seed=32)).sum(), leaves))


def assert_equal_to_dense(name: str, head: Head, dtype: torch.dtype, *, workspace: int | None, v: int = V, **needs) -> None:
    cost, dense, arguments = PAIRS[name]
    exact, leaves = cast(head, torch.float64, **needs)
    truth, slopes = value_and_gradients(dense, leaves, arguments(exact, v))
    ours, leaves = cast(head, dtype, **needs)
    given = [cast(one, dtype)[0] if isinstance(one, Head) else one for one in arguments(head, v)[1:]]
    got, gradients = value_and_gradients(cost, leaves, (ours, *given), workspace=workspace)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), truth, rtol=tolerance, atol=tolerance)
    for gradient, slope, leaf in zip(gradients, slopes, leaves, strict=True):
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape
        assert (gradient - slope).norm() <= 5 * tolerance * slope.norm()


@costs
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option(name: str, options: dict, dtype: torch.dtype) -> None:
    for workspace in (TINY, None):
        assert_equal_to_dense(name, policy(**options), dtype, workspace=workspace)


@costs
def test_vocabularies_of_different_size_and_parts_that_are_frozen(name: str) -> None:
    for v, w in ((V, 500), (500, V)):
        assert_equal_to_dense(name, policy(v=v), torch.float64, workspace=TINY, v=w)
    for needs in ({"weight": False}, {"x": False}):
        assert_equal_to_dense(name, policy(extra=True, bias=True), torch.float64, workspace=TINY, **needs)


@costs
def test_gradcheck(name: str) -> None:
    """Away from ties, where |p - q| has no derivative: random numbers have none."""
    cost, _, _ = PAIRS[name]
    ref = reference(4 if name == "span" else 3, 20)
    rest = (ids(5, 4), ids(5, 4, seed=33)) if name == "span" else ()
    x, weight, bias = normal(4, 3, seed=1), normal(20, 3, seed=2), normal(20, seed=3)
    scale = 1 if name == "l1" else 1e3

    def value(*tensors: Tensor) -> Tensor:
        return scale * cost(Head(tensors[0], tensors[1], bias=tensors[2], softcap=4.0), ref, *rest, workspace=TINY)

    assert torch.autograd.gradcheck(value, [tensor.requires_grad_() for tensor in (x, weight, bias)])


@costs
def test_bfloat16_inputs(name: str) -> None:
    cost, dense, _ = PAIRS[name]
    narrow, leaves = cast(policy(h=16), torch.bfloat16)
    ref, rest = cast(reference(), torch.bfloat16)[0], (FIRST, SECOND) if name == "span" else ()
    wide, wide_leaves = cast(narrow, torch.float64)
    truth, slopes = value_and_gradients(dense, wide_leaves, (wide, cast(ref, torch.float64)[0], *rest))
    got, gradients = value_and_gradients(cost, leaves, (narrow, ref, *rest), workspace=TINY)
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-5)
    for gradient, slope in zip(gradients, slopes, strict=True):
        assert gradient.dtype == torch.bfloat16 and (gradient - slope).norm() <= 2**-8 * slope.norm()


def test_values_by_hand() -> None:
    """p = (3/4, 1/4) and (1/2, 1/2), q = (1/2, 1/2), (1, 0) to rounding."""
    logits = torch.tensor([[3.0, 1.0], [1.0, 1.0]], dtype=torch.float64).log()
    other = torch.tensor([[0.0, 0.0], [0.0, -1e4]], dtype=torch.float64)
    head, ref = (Head(z, torch.eye(2, dtype=torch.float64)) for z in (logits, other))
    expected = torch.tensor([[0.5, 0.5], [0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(l1_cost(head, ref), expected)
    got = span_cost(head, ref, torch.tensor([0]), torch.tensor([1]))  # (1/2 - 3/8)^2 + (0 - 1/8)^2
    torch.testing.assert_close(got, torch.tensor([1 / 32], dtype=torch.float64))


def test_the_diagonal_is_the_total_variation_and_equal_models_cost_nothing() -> None:
    head = policy()
    assert l1_cost(head, head).diagonal().abs().max() == 0 and span_cost(head, head, FIRST, SECOND).abs().max() == 0
    both = Separable("l1", lambda lp, lq: (lp.exp() - lq.exp()).abs())
    torch.testing.assert_close(l1_cost(head, reference()).diagonal(), head_stats(head, [both], ref=reference())["l1"])


def test_nothing_to_compare() -> None:
    head, leaves = cast(policy(n=0), torch.float32)
    none = torch.zeros(0, dtype=torch.int64)
    empty = cast(reference(0), torch.float32)[0]
    for out in (l1_cost(head, cast(reference(M), torch.float32)[0]), l1_cost(head, empty), span_cost(head, empty, none, none)):
        assert out.numel() == 0
        assert all(gradient.abs().sum() == 0 for gradient in torch.autograd.grad(out.sum(), leaves))
    head, leaves = cast(policy(), torch.float32)
    out = span_cost(head, cast(reference(), torch.float32)[0], none, none)
    assert out.shape == (0,) and all(g.abs().sum() == 0 for g in torch.autograd.grad(out.sum(), leaves))


@costs
def test_memory_is_the_workspace_not_the_vocabulary(name: str) -> None:
    n, v, workspace = 256, 20_000, 1 << 20
    head, leaves = cast(policy(n=n, v=v, h=16), torch.float32)
    ref = cast(reference(n, v), torch.float32, x=False, weight=False)[0]
    rest = (torch.arange(n - 1), torch.arange(1, n)) if name == "span" else ()
    peak = peak_bytes(lambda: torch.autograd.grad(PAIRS[name][0](head, ref, *rest, workspace=workspace).sum(), leaves))
    results = 4 * 16 * (n + v) + (4 * 3 * n * n if name == "l1" else 0)
    assert peak <= results + 1.25 * workspace + 4 * n * 60 and workspace < 4 * n * v / 16


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (FIRST, SECOND[:-1], r"second: \[59\]"),
        (FIRST.float(), SECOND, "first: .* torch.float32"),
        (FIRST, SECOND + N, f"second: rows from .* outside the {N} tokens"),
    ],
)
def test_mistakes(first: Tensor, second: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        span_cost(policy(), reference(), first, second)
    with pytest.raises(ValueError, match="ref: x"):
        span_cost(policy(), reference(N - 1), FIRST, SECOND)
