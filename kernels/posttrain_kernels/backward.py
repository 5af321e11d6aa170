"""The deferred schedules of the backward: project again, take the gradient of all statistics at once.

Vocabulary outermost, so each tile of dW is summed over all tokens and written once, in the dtype of the parameter; for
statistics of whole rows (`Rowwise`) tokens outermost, with sums for dW in the dtype of the logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .gradient import Coefficients
from .kept import block_gradient, coefficients_of
from .project import accumulate, exact_products, logits_tile, narrow, row_factor, tile_weights
from .task import Gradients, Need, Result, Task


def backward_pass(task: Task, result: Result, upstream: Mapping[str, Tensor], need: Need) -> Gradients:
    """Gradients for upstream gradients by name, in the dtype of the logits or of the parameter; zeros where nothing comes."""
    head, n = task.head, len(task.head.x)
    if n == 0 or not upstream:
        return Gradients.zeros(head, need)
    whole = coefficients_of(task, result, upstream, slice(n))
    held, result.held = result.held, {}  # a second attempt, or backward, finds none
    return _by_block(task, result, whole, need) if whole.rowwise else _by_tile(task, whole, need, held)


def _by_block(task: Task, result: Result, whole: Coefficients, need: Need) -> Gradients:
    head, n = task.head, len(task.head.x)
    out = Gradients.zeros(head, need)
    rows = min(task.sizes.kept, n)
    common = [tile for tile in task.tiles(head) if tile[1] <= task.edge]
    heads = [(head, task.tiles(head))] if task.ref is None else [(head, task.tiles(head)), (task.ref, common)]
    kept = [[whole.factor.new_empty(rows, stop - start) for start, stop in tiles] for _, tiles in heads]
    for first in range(0, n, rows):
        block = slice(first, min(first + rows, n))
        for (one, tiles), buffers in zip(heads, kept, strict=True):
            with exact_products(one.x):
                for (start, stop), z in zip(tiles, buffers, strict=True):
                    logits_tile(one, tile_weights(one, start, stop), start, block, z[: block.stop - first])
        block_gradient(task, result, whole.rows(block), block, kept, out)
    return out


def _by_tile(task: Task, whole: Coefficients, need: Need, held: dict[tuple[int, int], Tensor]) -> Gradients:
    head, n = task.head, len(task.head.x)
    out = Gradients(
        [whole.factor.new_zeros(x.shape) if needed else None for (x, _), needed in zip(head.terms, need.x, strict=True)],
        [torch.empty_like(w) if needed else None for (_, w), needed in zip(head.terms, need.weight, strict=True)],
        torch.empty_like(head.bias) if need.bias else None,
    )
    for total in (*out.weight, out.bias):
        if total is not None:
            total[head.size :] = 0  # padding of the vocabulary
    chunks = task.sizes.chunks(n)
    rows = max(chunk.stop - chunk.start for chunk in chunks)
    work = [whole.factor.new_empty(rows * task.sizes.items) for _ in range(2 if whole.pairs else 1)]
    ahead = [] if head.x.device.type == "cpu" else chunks
    scaled = [out.scaled(head, chunk, row_factor(head, whole.factor[chunk], chunk)) for chunk in ahead]
    sweep = _Sweep(task, whole, out, chunks, work, scaled)
    for start, stop in task.tiles(head):
        _backward_tile(sweep, start, stop, held.pop((start, stop), None))
    for total in out.x:
        if total is not None:
            total *= row_factor(head, whole.factor, slice(n))
    return out


@dataclass
class _Sweep:
    """What all tiles of a backward share."""

    task: Task
    whole: Coefficients
    out: Gradients
    chunks: list[slice]

    work: list[Tensor]
    """Memory of a tile, for each head that is read."""

    scaled: list[list[Tensor | None]]
    """`Gradients.scaled` of every chunk, on a GPU, where operands are narrow; on a CPU empty, as all of them would take as much
    memory as the gradient of x."""


def _backward_tile(sweep: _Sweep, start: int, stop: int, held: Tensor | None) -> None:
    task, whole, out, head, width = sweep.task, sweep.whole, sweep.out, sweep.task.head, stop - start
    weights = tile_weights(head, start, stop)
    pairs = bool(whole.pairs) and stop <= task.edge
    ref_weights = tile_weights(task.ref, start, stop) if pairs else []
    sums = [None if w is None else _sum_of(w[start:stop], whole.factor.dtype) for w in out.weight]
    bias = whole.factor.new_zeros(width) if out.bias is not None else None
    for i, rows in enumerate(sweep.chunks):
        n = rows.stop - rows.start
        z, *rest = (buffer[: n * width].view(n, width) for buffer in sweep.work)
        if held is not None:
            z = held[rows]
        else:
            with exact_products(head.x):
                logits_tile(head, weights, start, rows, z, raw=task.passes.raw)
        if pairs:
            with exact_products(task.ref.x):
                logits_tile(task.ref, ref_weights, start, rows, rest[0])
        own = whole.rows(rows)
        factor = row_factor(head, own.factor, rows)
        dz = task.passes.gradient(task, own, z, rest[0] if pairs else None, start, rows)
        if bias is not None:
            bias.addmv_(dz.mT, factor.squeeze(1))
        scaled = sweep.scaled[i] if sweep.scaled else out.scaled(head, rows, factor)
        with exact_products(head.x):
            for (x, _), right, weight, dx, dw in zip(head.terms, scaled, weights, out.x, sums, strict=True):
                narrowed = narrow(dz, x)
                if dx is not None:
                    accumulate(dx[rows], narrowed, weight, add=True)
                if dw is not None:
                    accumulate(dw, narrowed.mT, right, add=i > 0)
    for total, dw in zip(out.weight, sums, strict=True):
        if total is not None and dw.dtype != total.dtype:
            total[start:stop] = dw
    if bias is not None:
        out.bias[start:stop] = bias


def _sum_of(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Where a tile of dW is summed over the chunks: in place, unless the parameter is narrower than the sum should be."""
    return rows if rows.dtype == dtype else torch.empty_like(rows, dtype=dtype)
