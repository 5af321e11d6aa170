"""Sums over the items of a function of the probabilities of several tokens of two models at that item.

    S = sum_v g(p(v) [N], q(v) [M])         dS/dz_i(v) = p_i(v) (s_i(v) - sum_w p_i(w) s_i(w)),   s_i(v) = dg/dp_i(v)

Unlike the statistics of `head_stats` these see many tokens at once, so a tile holds all tokens and few items. Forward: the
normalisers, then g tile by tile. Backward: sum_w p s first, then the gradient; each projects both heads again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .chunked import chunked_stats, sizes_of, workspace_of
from .head import Form, Head, check_shapes, common
from .memory import with_less
from .project import exact_products, logits_tile, row_factor, softcap_slope, tile_weights
from .task import Gradients, Need


@dataclass(frozen=True)
class Cost:
    """g: what the items of a tile contribute, from the probabilities p [N, C] and q [M, C]."""

    value: Callable[[Tensor, Tensor], Tensor]
    """(p, q) -> contribution, of any shape."""

    slope: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    """(p, q, gradient of the result) -> [N, C] gradient in p; None: autograd takes it."""

    def gradient(self, p: Tensor, q: Tensor, upstream: Tensor) -> Tensor:
        """[N, C] gradient in p."""
        if self.slope is not None:
            return self.slope(p, q, upstream)
        with torch.enable_grad():
            p = p.detach().requires_grad_()
            return torch.autograd.grad(self.value(p, q), p, upstream)[0]


def _l1_slope(p: Tensor, q: Tensor, upstream: Tensor) -> Tensor:
    # Autograd of cdist would compute the distances again, which takes longer than this; at p = 1 their values do not matter.
    return torch.ops.aten._cdist_backward(upstream, p, q, 1.0, upstream)


L1 = Cost(lambda p, q: torch.cdist(p, q, p=1), _l1_slope)
"""[N, M] sum over the items of |p_i - q_j|."""


def span(first: Tensor, second: Tensor) -> Cost:
    """[S] sum over the items of (q_a q_b - p_a p_b)^2."""
    return Cost(lambda p, q: (q[first] * q[second] - p[first] * p[second]).square().sum(-1))


def l1_cost(head: Head, ref: Head, *, workspace: int | None = None) -> Tensor:
    """How far apart the distributions of every two tokens are: [N, M] sum_v |p_i(v) - q_j(v)| over the common vocabulary.

    Args:
        head: N tokens of the policy; gradients flow to its tensors.
        ref: M tokens of the second head; no gradient.
        workspace: bytes of temporary memory to aim at, beside a result and its gradient.

    Raises:
        ValueError: shapes that do not fit.
    """
    n, m = len(head.x), len(ref.x)
    # Elsewhere than on a CPU the backward of cdist makes a tensor of [N, M, C].
    pairs = 0 if head.x.device.type == "cpu" else n * m
    return _cost(head, ref, L1, numbers=6 * n + 3 * m + pairs, workspace=workspace)


def span_cost(head: Head, ref: Head, first: Tensor, second: Tensor, *, workspace: int | None = None) -> Tensor:
    """How differently two models go on over two tokens: [S] sum_v (q_a(v) q_b(v) - p_a(v) p_b(v))^2, common vocabulary.

    Args:
        head: N tokens of the policy; gradients flow to its tensors.
        ref: the same tokens of the second head; no gradient.
        first, second: [S] int64 rows a and b of each pair.
        workspace: bytes of temporary memory to aim at.

    Raises:
        ValueError: shapes that do not fit, or rows that are not there.
    """
    n = len(head.x)
    check_shapes("ref", ref, n)
    for name, rows in (("first", first), ("second", second)):
        if rows.dim() != 1 or rows.shape != first.shape or rows.dtype != torch.int64:
            raise ValueError(f"{name}: {list(rows.shape)} {rows.dtype}, expected int64, [S] as the other")
        if rows.device.type == "cpu" and rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < n:
            raise ValueError(f"{name}: rows from {int(rows.min())} to {int(rows.max())}, outside the {n} tokens")
    return _cost(head, ref, span(first, second), numbers=8 * n + 12 * len(first), workspace=workspace)


@dataclass(frozen=True)
class _Plan:
    """The part of a call that is not tensors."""

    cost: Cost
    numbers: int
    """How many numbers an item of a tile takes."""

    workspace: int
    """Bytes of temporary memory to aim at."""

    forms: tuple[Form, Form]
    need: Need

    def width(self, head: Head, workspace: int) -> int:
        """Items of a tile."""
        most = sizes_of(head, workspace, temporaries=1, whole=0).items
        return min(max(workspace // (max(self.numbers, 1) * head.dtype.itemsize), 16), most)

    def heads(self, tensors: Sequence[Tensor | None]) -> tuple[Head, Head]:
        """The heads put together again."""
        count = self.forms[0].count
        return self.forms[0].head(tensors[:count]), self.forms[1].head(tensors[count:])


def _cost(head: Head, ref: Head, cost: Cost, *, numbers: int, workspace: int | None) -> Tensor:
    """The sum over the common vocabulary; `numbers` is how many numbers an item takes."""
    check_shapes("head", head, len(head.x))
    check_shapes("ref", ref, len(ref.x))
    edge = common(head, ref)
    head, ref = (dataclasses.replace(one, vocab=edge) for one in (head, ref))
    plan = _Plan(cost, numbers, workspace_of(head, workspace), (Form.of(head), Form.of(ref)), Need.of(head))
    with torch.no_grad():
        arguments = {"target": None, "index": None, "ref": None, "workspace": workspace, "eager": None}
        normalisers = [chunked_stats(one, ["lse"], **arguments)["lse"] for one in (head, ref)]
    return _Sum.apply(plan, *normalisers, *head.tensors, *ref.tensors)


@dataclass
class _Tile:
    """A tile of both heads."""

    start: int
    weights: list[Tensor]
    """Of the head, as operands."""

    p: Tensor
    """[N, C]"""

    q: Tensor
    """[M, C]"""

    cap: Tensor | None
    """[N, C] derivative of the head's soft-cap."""


def _tiles(plan: _Plan, heads: Sequence[Head], normalisers: Sequence[Tensor], workspace: int) -> Iterator[_Tile]:
    """All tiles; the memory of one is that of the next."""
    head, size = heads[0], heads[0].size
    width = plan.width(head, workspace)
    buffers = [lse.new_empty(len(lse) * width) for lse in normalisers]
    for start in range(0, size, width):
        stop = min(start + width, size)
        weights = [tile_weights(one, start, stop) for one in heads]
        logits = []
        for one, its, lse, buffer in zip(heads, weights, normalisers, buffers, strict=True):
            z = buffer[: len(lse) * (stop - start)].view(len(lse), stop - start)
            with exact_products(one.x):
                logits.append(logits_tile(one, its, start, slice(0, len(lse)), z))
        cap = softcap_slope(head, logits[0], slice(0, len(head.x)))
        p, q = (z.sub_(lse[:, None]).exp_() for z, lse in zip(logits, normalisers, strict=True))
        yield _Tile(start, weights[0], p, q.to(p.dtype), cap)


def _value(plan: _Plan, heads: Sequence[Head], normalisers: Sequence[Tensor], workspace: int) -> Tensor:
    """The sum over the tiles."""
    parts = (plan.cost.value(tile.p, tile.q) for tile in _tiles(plan, heads, normalisers, workspace))
    total = next(parts)
    for part in parts:
        total += part
    return total


def _gradients(
    plan: _Plan, heads: Sequence[Head], normalisers: Sequence[Tensor], upstream: Tensor, workspace: int
) -> Gradients:
    """Of the tensors of the first head."""
    head = heads[0]
    rows, out = slice(0, len(head.x)), Gradients.zeros(head, plan.need)
    mean = torch.zeros_like(normalisers[0])  # sum_w p(w) s(w)
    for tile in _tiles(plan, heads, normalisers, workspace):
        mean += plan.cost.gradient(tile.p, tile.q, upstream).mul_(tile.p).sum(-1)
    factor = row_factor(head, torch.ones_like(mean)[:, None], rows)
    scaled = out.scaled(head, rows, factor)
    for tile in _tiles(plan, heads, normalisers, workspace):
        dz = plan.cost.gradient(tile.p, tile.q, upstream).sub_(mean[:, None]).mul_(tile.p)
        if tile.cap is not None:
            dz.mul_(tile.cap)
        with exact_products(head.x):
            out.add_tile(head, tile.weights, dz, rows, tile.start, factor, scaled)
    for dx in out.x:
        if dx is not None:
            dx *= factor
    return out


class _Sum(torch.autograd.Function):
    """Inputs: the plan, the log sum exp of both heads, and their tensors."""

    @staticmethod
    def forward(ctx: FunctionCtx, plan: _Plan, lse: Tensor, ref_lse: Tensor, *tensors: Tensor | None) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(lse, ref_lse, *tensors)
        heads = plan.heads(tensors)
        return with_less(lambda space: _value(plan, heads, (lse, ref_lse), space), plan.workspace, lse.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        *normalisers, tensors = *ctx.saved_tensors[:2], ctx.saved_tensors[2:]
        heads, upstream = plan.heads(tensors), upstream.contiguous()
        out = with_less(lambda space: _gradients(plan, heads, normalisers, upstream, space), plan.workspace, upstream.device)
        found = out.like(heads[0])
        return (None, None, None, *found, *[None] * (len(tensors) - len(found)))
