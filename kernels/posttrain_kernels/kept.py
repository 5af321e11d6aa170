"""The gradient of a block of tokens whose logits are kept over the whole vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .fold import Merge, State
from .gradient import Coefficients, coefficients, row_slope, slope
from .head import FLOOR, Head
from .project import exact_products, row_factor, softcap_slope, tile_weights
from .task import Gradients, Passes, Result, Task

Kept = list[list[Tensor]]
"""For the head and, if it is read, the ref: [n or more, C] logits of every tile."""


def coefficients_of(task: Task, result: Result, upstream: Mapping[str, Tensor], rows: slice) -> Coefficients:
    """The coefficients of some tokens."""
    return coefficients(
        upstream,
        result.state.rows(rows),
        None if task.target is None else task.target[rows],
        None if task.index is None else task.index[rows],
        None if result.reference is None else result.reference[rows],
        {name: value[rows] for name, value in result.sums.items()},
        task.rowwise,
    )


def fold(raw: Head | None, state: State, z: Tensor, start: int, rows: slice, ids: Tensor, scratch: Tensor) -> Merge:
    """`State.fold` as one of the passes."""
    return state.fold(z, start, ids, scratch)


_STRIP = 64
"""Tokens of a tile that functions with temporaries of their own see at a time on a CPU: those of a whole tile go back to the
system and come anew, which takes longer than what is computed in them."""


def strips(n: int, device: torch.device) -> list[slice]:
    """The pieces of n tokens of a tile that are worked on at a time."""
    size = _STRIP if device.type == "cpu" else n
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def divergences(task: Task, result: Result, rows: slice, kept: Kept) -> None:
    """Values and, if asked for, C of the divergences of a block of tokens."""
    for z, zq, tokens in _pair_strips(result, rows, kept):
        lp = (z - result.state.common[tokens, None]).clamp_(min=FLOOR)
        lq = (zq - result.reference[tokens, None]).to(z.dtype).clamp_(min=FLOOR)
        for name, divergence in task.divergences.items():
            result.values[name][tokens] += divergence.f(lp, lq).sum(-1)
            if name in result.sums:
                result.sums[name][tokens] += slope(divergence, lp, lq).sum(-1)


def divergences_with_slope(task: Task, result: Result, rows: slice, kept: Kept, unit: str) -> None:
    """The same; in place of the logits it leaves, over the common vocabulary, p of the policy and the slope of `unit`."""
    for z, zq, tokens in _pair_strips(result, rows, kept):
        lp = z.sub_(result.state.common[tokens, None]).clamp_(min=FLOOR)
        lq = zq.sub_(result.reference[tokens, None]).to(z.dtype).clamp_(min=FLOOR)
        for name, divergence in task.divergences.items():
            result.values[name][tokens] += divergence.f(lp, lq).sum(-1)
            found = slope(divergence, lp, lq)
            result.sums[name][tokens] += found.sum(-1)
            if name == unit:
                own = found
        z.exp_()
        zq.copy_(own)


def _pair_strips(result: Result, rows: slice, kept: Kept) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """(logits of the head, logits of the ref, which tokens) of every tile of the common vocabulary, in pieces."""
    pieces = strips(rows.stop - rows.start, result.state.m.device)
    for z, zq in zip(*kept, strict=False):  # the tiles of the common vocabulary come first in both
        for part in pieces:
            yield z[part], zq[part], slice(rows.start + part.start, rows.start + part.stop)


def slope_gradient(task: Task, result: Result, rows: slice, kept: Kept, unit: str, out: Gradients) -> None:
    """Add the gradient of `unit` for upstream gradients of 1 to `out`, from what `divergences_with_slope` has left."""
    head, n = task.head, rows.stop - rows.start
    c = result.sums[unit][rows, None]
    factor = row_factor(head, torch.ones_like(c), rows)
    scaled = out.scaled(head, rows, factor)
    tiles = [tile for tile in task.tiles(head) if tile[1] <= task.edge]
    with exact_products(head.x):
        for (start, stop), p, its in zip(tiles, *kept, strict=False):
            dz = p[:n].mul_(c).neg_().add_(its[:n])
            out.add_tile(head, tile_weights(head, start, stop), dz, rows, start, factor, scaled)
    for dx in out.x:
        if dx is not None:
            dx[rows] *= factor


def gradient_tile(
    task: Task, own: Coefficients, z: Tensor, zq: Tensor | None, start: int, rows: slice, more: Tensor | None = None
) -> Tensor:
    """[n, C] derivative in the logits before soft-cap, over `own.factor`; overwrites z and zq.

    Args:
        more: [n, C] a further part of the derivative in the logits.
    """
    cap = softcap_slope(task.head, z, rows)
    if zq is not None and own.pairs:
        for part in strips(len(z), z.device):
            found = own.rows(part).tile(z[part], zq[part], start, task.divergences)
            if own.at_max is None:  # else it is z itself
                z[part].copy_(found)
        dz = z
    else:
        dz = own.tile(z, zq, start, task.divergences)
    if more is not None:
        dz.add_(more)
    return dz if cap is None else dz.mul_(cap)


def block_gradient(task: Task, result: Result, own: Coefficients, rows: slice, kept: Kept, out: Gradients) -> None:
    """Add the gradient of a block of tokens to `out`; overwrites their logits.

    Args:
        own: coefficients of the block.
        rows: the tokens of the block.
        kept: their logits.
        out: sums in the dtype of the logits, as `Gradients.zeros` makes them.
    """
    head, n = task.head, rows.stop - rows.start
    if own.rowwise:
        _rows_to_gradient(task, result, own, rows, kept)
    factor = row_factor(head, own.factor, rows)
    scaled = out.scaled(head, rows, factor)
    with exact_products(head.x):
        for j, (start, stop) in enumerate(task.tiles(head)):
            dz = kept[0][j][:n]
            if not own.rowwise:
                dz = task.passes.gradient(
                    task, own, dz, kept[1][j][:n] if own.pairs and stop <= task.edge else None, start, rows
                )
            out.add_tile(head, tile_weights(head, start, stop), dz, rows, start, factor, scaled)
    for dx in out.x:
        if dx is not None:
            dx[rows] *= factor


def parts(task: Task, rows: slice) -> list[slice]:
    """The pieces of a block of tokens that a Rowwise sees, counted from the first token of the block."""
    n = rows.stop - rows.start
    return [slice(start, min(start + task.sizes.whole, n)) for start in range(0, n, task.sizes.whole)]


def log_probs(task: Task, result: Result, tokens: slice, part: slice, kept: Kept) -> tuple[Tensor, Tensor | None]:
    """[n, C] log-probs of both heads over the common vocabulary, not below FLOOR.

    Args:
        tokens: which.
        part: the same, counted from the first token of the block.
        kept: logits of the block.
    """

    def whole(tiles: list[Tensor], lse: Tensor) -> Tensor:
        z = torch.cat([tile[part] for tile in tiles[:count]], 1)
        return z.sub_(lse[tokens, None]).to(task.head.dtype).clamp_(min=FLOOR)

    count = sum(stop <= task.edge for _, stop in task.tiles(task.head))  # they come first in both
    lp = whole(kept[0], result.state.common)
    return lp, None if task.ref is None else whole(kept[1], result.reference)


def _rows_to_gradient(task: Task, result: Result, own: Coefficients, rows: slice, kept: Kept) -> None:
    """Turn the policy's logits of a block into the derivative in them, over `own.factor`, of all statistics together."""
    for part in parts(task, rows):
        tokens = slice(rows.start + part.start, rows.start + part.stop)
        its = own.rows(part)
        more = _row_gradient(task, result, its, tokens, part, kept)
        for j, (start, stop) in enumerate(task.tiles(task.head)):
            z, inside = kept[0][j][part], stop <= task.edge
            zq = kept[1][j][part] if its.pairs and inside else None
            dz = gradient_tile(task, its, z, zq, start, tokens, more[:, start:stop] if inside else None)
            if dz is not z:
                z.copy_(dz)


def _row_gradient(task: Task, result: Result, own: Coefficients, tokens: slice, part: slice, kept: Kept) -> Tensor:
    """[n, C] derivative of the Rowwise statistics in the logits, over `own.factor`; in the forward, their values too."""
    lp, lq = log_probs(task, result, tokens, part, kept)
    target = None if task.target is None else task.target[tokens]
    total = torch.zeros_like(lp)
    for name, upstream in own.rowwise.items():
        found, derivative = row_slope(task.rowwise[name], lp, lq, target, upstream)
        for its, values in found.items():
            if its in result.values:
                result.values[its][tokens] = values
        if derivative is not None:
            total += derivative
    return total.addcmul_(lp.exp_(), total.sum(-1, keepdim=True), value=-1)


TORCH = Passes(fold, divergences, gradient_tile, temporaries=8, alone=1, streams=True)
"""The elements of a tile by torch operations."""
