"""The two loops over blocks of tokens and tiles of the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .fold import State
from .gradient import Coefficients, coefficients, slope
from .head import FLOOR, Head, Separable, common
from .project import accumulate, exact_products, logits_tile, narrow, operand, row_factor, softcap_slope, tile_weights

Block = tuple[slice, slice]
"""(tokens, the same with padding)"""


@dataclass(frozen=True)
class Sizes:
    """How the loops are cut. Depends on device, dtype, vocabulary and workspace, never on N."""

    rows: int
    """Tokens of one product in the forward, so that a token's logits have the same bits in any batch."""

    pad: int
    """The last product of a forward is padded to a multiple of this."""

    items: int
    """Items of a tile."""

    block: int
    """Tokens folded at a time."""

    kept: int
    """Tokens folded at a time where their logits are kept over the whole vocabulary."""

    chunk: int
    """Tokens of a backward chunk."""

    def blocks(self, n: int, tokens: int) -> list[Block]:
        """Forward blocks of so many tokens."""
        starts = range(0, n, tokens)
        padded = [min(tokens, -(-(n - start) // self.pad) * self.pad) for start in starts]
        return [(slice(s, min(s + p, n)), slice(s, s + p)) for s, p in zip(starts, padded, strict=True)]

    def chunks(self, n: int) -> list[slice]:
        """Backward chunks of n tokens, of nearly equal length."""
        count = -(-n // self.chunk)
        return [slice(n * i // count, n * (i + 1) // count) for i in range(count)]

    def tiles(self, size: int, edge: int) -> list[tuple[int, int]]:
        """(start, stop) of every tile; one begins at the `edge` of the common vocabulary."""
        spans = ((0, edge), (edge, size))
        return [(s, min(s + self.items, stop)) for begin, stop in spans for s in range(begin, stop, self.items)]


@dataclass(frozen=True)
class Task:
    """Inputs of one call, as the loops see them."""

    head: Head
    ref: Head | None
    target: Tensor | None
    """[N], if logp or ref_logp is wanted."""

    index: Tensor | None
    """[N, K], if gather is wanted."""

    names: Sequence[str]
    """What is wanted."""

    divergences: Mapping[str, Separable]
    """The two-head statistics that need the logits of both."""

    sizes: Sizes

    @property
    def edge(self) -> int:
        """Size of the common vocabulary, the head's own without a ref."""
        return self.head.size if self.ref is None else common(self.head, self.ref)

    def tiles(self, head: Head) -> list[tuple[int, int]]:
        """The tiles of one of the heads."""
        return self.sizes.tiles(head.size, self.edge)


@dataclass
class Result:
    """What a forward pass leaves."""

    state: State
    """Of the policy."""

    reference: Tensor | None
    """[N] log sum exp of the reference over the common vocabulary."""

    values: dict[str, Tensor]
    """[N] each: the two-head statistics."""

    sums: dict[str, Tensor]
    """[N] each: C of the divergences, for their gradients (gradient.py)."""

    gradients: list[Tensor]
    """[N, H_i] of `row_scale` with respect to each x_i; empty for the deferred schedule."""


def forward_pass(task: Task, *, row_scale: str | None, grad: bool) -> Result:
    """Fold all logits; with `row_scale`, also the gradient of that statistic to the hidden states."""
    head, n = task.head, len(task.head.x)
    keep = bool(task.divergences or row_scale)
    blocks = task.sizes.blocks(n, task.sizes.kept if keep else task.sizes.block)
    padded = blocks[-1][1].stop if blocks else 0
    ids = _ids(n, padded, [task.target if "logp" in task.names else None, task.index], head.x.device)
    ref_ids = _ids(n, padded, [task.target if "ref_logp" in task.names else None], head.x.device)
    state = State.empty(ids, head.dtype, set(task.names))
    ref_state = State.empty(ref_ids, head.dtype, set()) if task.ref is not None else None
    zeros = state.m.new_zeros
    result = Result(
        state,
        None if ref_state is None else ref_state.common,
        values={name: zeros(n) for name in task.divergences},
        sums={name: zeros(n) for name in task.divergences if grad},
        gradients=[zeros(x.shape) for x, _ in head.terms] if row_scale else [],
    )
    heads = [(head, state, ids), (task.ref, ref_state, ref_ids)][: 1 if task.ref is None else 2]
    rows = max((pad.stop - pad.start for _, pad in blocks), default=0)
    scratch = [its.m.new_empty(rows * task.sizes.items) for _, its, _ in heads]
    if not keep:
        for (one, its, its_ids), work in zip(heads, scratch, strict=True):
            _fold(task, one, its, its_ids, blocks, [], work)
    else:
        kept = [[its.m.new_empty(rows, stop - start) for start, stop in task.tiles(one)] for one, its, _ in heads]
        for block in blocks:
            for (one, its, its_ids), buffers, work in zip(heads, kept, scratch, strict=True):
                _fold(task, one, its, its_ids, [block], buffers, work)
            if task.divergences:
                _divergences(task, result, block[0], kept)
            if row_scale:
                _row_gradient(task, result, row_scale, block[0], kept)
    result.state = state.rows(slice(n))
    if ref_state is not None:
        result.reference = ref_state.common[:n]
    if "ref_logp" in task.names:
        result.values["ref_logp"] = ref_state.rows(slice(n)).read("logp", 1).to(head.dtype)
    return result


def _ids(n: int, padded: int, given: list[Tensor | None], device: torch.device) -> Tensor:
    parts = [part if part.dim() == 2 else part[:, None] for part in given if part is not None]
    ids = torch.cat(parts, 1) if parts else torch.zeros(n, 0, dtype=torch.int64, device=device)
    return torch.cat([ids, ids.new_zeros(padded - n, ids.shape[1])])


def _fold(task: Task, head: Head, state: State, ids: Tensor, blocks: list[Block], kept: list[Tensor], scratch: Tensor) -> None:
    """Project and fold all tiles of `blocks`; `kept` receives the logits, one tensor a tile, if given."""
    parts = [(real, padded.stop - padded.start, state.rows(padded), ids[padded]) for real, padded in blocks]
    with exact_products(head.x):
        for j, (start, stop) in enumerate(task.tiles(head)):
            weights = tile_weights(head, start, stop)
            for real, rows, part, its_ids in parts:
                work = scratch[: rows * (stop - start)].view(rows, stop - start)
                z = kept[j][:rows] if kept else work
                for first in range(0, rows, task.sizes.rows):
                    product = z[first : first + task.sizes.rows]
                    tokens = slice(real.start + first, min(real.start + first + len(product), real.stop))
                    logits_tile(head, weights, start, tokens, product)
                part.fold(z, start, its_ids, work)
                if stop == task.edge:
                    part.common.copy_(part.lse)


def _divergences(task: Task, result: Result, rows: slice, kept: list[list[Tensor]]) -> None:
    n = rows.stop - rows.start
    lse, ref_lse = result.state.common[rows, None], result.reference[rows, None]
    for z, zq in zip(*kept, strict=False):  # the tiles of the common vocabulary come first in both
        lp, lq = (z[:n] - lse).clamp_(min=FLOOR), (zq[:n] - ref_lse).to(z.dtype).clamp_(min=FLOOR)
        for name, divergence in task.divergences.items():
            result.values[name][rows] += divergence.f(lp, lq).sum(-1)
            if name in result.sums:
                result.sums[name][rows] += slope(divergence, lp, lq).sum(-1)


def _coefficients(task: Task, result: Result, upstream: Mapping[str, Tensor], rows: slice) -> Coefficients:
    return coefficients(
        upstream,
        result.state.rows(rows),
        None if task.target is None else task.target[rows],
        None if task.index is None else task.index[rows],
        None if result.reference is None else result.reference[rows],
        {name: value[rows] for name, value in result.sums.items()},
    )


def _gradient_tile(task: Task, own: Coefficients, z: Tensor, zq: Tensor | None, start: int, rows: slice) -> Tensor:
    """[n, C] derivative in the logits before soft-cap, over `own.factor`; overwrites z and zq."""
    cap = softcap_slope(task.head, z, rows)
    dz = own.tile(z, zq, start, task.divergences)
    return dz if cap is None else dz.mul_(cap)


def _row_gradient(task: Task, result: Result, name: str, rows: slice, kept: list[list[Tensor]]) -> None:
    head, n = task.head, rows.stop - rows.start
    own = _coefficients(task, result, {name: torch.ones_like(result.state.m[rows])}, rows)
    with exact_products(head.x):
        for j, (start, stop) in enumerate(task.tiles(head)):
            zq = kept[1][j][:n] if own.pairs and stop <= task.edge else None
            dz = _gradient_tile(task, own, kept[0][j][:n], zq, start, rows)
            weights = tile_weights(head, start, stop)
            for (x, _), weight, total in zip(head.terms, weights, result.gradients, strict=True):
                accumulate(total[rows], narrow(dz, x), weight, add=j > 0)
    for total in result.gradients:
        total[rows] *= row_factor(head, own.factor, rows)


@dataclass
class Gradients:
    """Gradients of a backward pass; None for what needs none."""

    x: list[Tensor | None]
    """[N, H_i] of every term."""

    weight: list[Tensor | None]
    """[V, H_i] of every term."""

    bias: Tensor | None
    """[V]"""


def backward_pass(
    task: Task, result: Result, upstream: Mapping[str, Tensor], need_x: list[bool], need_weight: list[bool], need_bias: bool
) -> Gradients:
    """The deferred schedule: project again, vocabulary outermost. Zeros where nothing comes from upstream."""
    head, n = task.head, len(task.head.x) if upstream else 0
    out = Gradients(
        [result.state.m.new_zeros(x.shape) if need else None for (x, _), need in zip(head.terms, need_x, strict=True)],
        [torch.empty_like(w) if need else None for (_, w), need in zip(head.terms, need_weight, strict=True)],
        torch.empty_like(head.bias) if need_bias else None,
    )
    for total in (*out.weight, out.bias):
        if total is not None:
            total[head.size if n else 0 :] = 0  # padding of the vocabulary; without tokens, all of it
    if n == 0:
        return out
    whole = _coefficients(task, result, upstream, slice(n))
    chunks = task.sizes.chunks(n)
    rows = max(chunk.stop - chunk.start for chunk in chunks)
    work = [result.state.m.new_empty(rows * task.sizes.items) for _ in range(2 if whole.pairs else 1)]
    for start, stop in task.tiles(head):
        _backward_tile(task, whole, out, chunks, start, stop, work)
    for total in out.x:
        if total is not None:
            total *= row_factor(head, whole.factor, slice(n))
    return out


def _backward_tile(
    task: Task, whole: Coefficients, out: Gradients, chunks: list[slice], start: int, stop: int, work: list[Tensor]
) -> None:
    head, width = task.head, stop - start
    weights = tile_weights(head, start, stop)
    pairs = bool(whole.pairs) and stop <= task.edge
    ref_weights = tile_weights(task.ref, start, stop) if pairs else []
    sums = [None if w is None else _sum_of(w[start:stop], whole.factor.dtype) for w in out.weight]
    bias = whole.factor.new_zeros(width) if out.bias is not None else None
    for i, rows in enumerate(chunks):
        n = rows.stop - rows.start
        z, *rest = (buffer[: n * width].view(n, width) for buffer in work)
        with exact_products(head.x):
            logits_tile(head, weights, start, rows, z)
        if pairs:
            with exact_products(task.ref.x):
                logits_tile(task.ref, ref_weights, start, rows, rest[0])
        own = whole.rows(rows)
        factor = row_factor(head, own.factor, rows)
        dz = _gradient_tile(task, own, z, rest[0] if pairs else None, start, rows)
        if bias is not None:
            bias.addmv_(dz.mT, factor.squeeze(1))
        with exact_products(head.x):
            for (x, _), weight, dx, dw in zip(head.terms, weights, out.x, sums, strict=True):
                narrowed = narrow(dz, x)
                if dx is not None:
                    accumulate(dx[rows], narrowed, weight, add=True)
                if dw is not None:
                    accumulate(dw, narrowed.mT, operand(x[rows].to(factor.dtype) * factor, x), add=i > 0)
    for total, dw in zip(out.weight, sums, strict=True):
        if total is not None and dw.dtype != total.dtype:
            total[start:stop] = dw
    if bias is not None:
        out.bias[start:stop] = bias


def _sum_of(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Where a tile of dW is summed over the chunks: in place, unless the parameter is narrower than the sum should be."""
    return rows if rows.dtype == dtype else torch.empty_like(rows, dtype=dtype)
