"""The forward loop over blocks of tokens and tiles of the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from .fold import State
from .head import Head, names_of
from .kept import (
    block_gradient,
    coefficients_of,
    divergences,
    divergences_with_slope,
    log_probs,
    parts,
    slope_gradient,
)
from .project import exact_products, logits_tile, tile_weights
from .streamed import Streamed
from .task import Block, Gradients, Need, Result, Sizes, Task


def forward_pass(task: Task, *, unit: str | None, need: Need | None, hold: int = 0) -> Result:
    """Fold all logits; with `unit`, also the gradient of that statistic for upstream gradients of 1.

    Args:
        need: what wants a gradient; None: nothing does.
        hold: bytes of tiles that may be left for the backward, where no whole rows are needed here.
    """
    head, n = task.head, len(task.head.x)
    streamed = Streamed(head, need.x, task.sizes.block) if _streams(task, unit, need) else None
    keep = bool(task.divergences or task.rowwise or unit) and streamed is None
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
        values={name: zeros(n) for name in (*task.divergences, *names_of(list(task.rowwise.values())))},
        sums={name: zeros(n) for name in task.divergences if need is not None},
        unit=Gradients.zeros(head, need) if unit and streamed is None else None,
    )
    heads = [(head, state, ids), (task.ref, ref_state, ref_ids)][: 1 if task.ref is None else 2]
    rows = max((pad.stop - pad.start for _, pad in blocks), default=0)
    scratch = [its.m.new_empty(rows * task.sizes.items) for _, its, _ in heads]
    if not keep:
        for start, stop in task.tiles(head) if need is not None and unit is None else []:
            hold -= padded * (stop - start) * head.dtype.itemsize
            if hold < 0:
                break
            result.held[start, stop] = state.m.new_empty(padded, stop - start)
        for (one, its, its_ids), work in zip(heads, scratch, strict=True):
            own = its is state
            held = list(result.held.values()) if own else []
            _fold(task, one, its, its_ids, blocks, held, work, streamed if own else None)
    else:
        sloped = _slopes(task, unit)
        kept = [[its.m.new_empty(rows, stop - start) for start, stop in task.tiles(one)] for one, its, _ in heads]
        for block in blocks:
            for (one, its, its_ids), buffers, work in zip(heads, kept, scratch, strict=True):
                _fold(task, one, its, its_ids, [block], buffers, work)
            if sloped:
                divergences_with_slope(task, result, block[0], kept, unit)
                slope_gradient(task, result, block[0], kept, unit, result.unit)
            elif task.divergences:
                task.passes.divergences(task, result, block[0], kept)
            if task.rowwise.keys() - {unit}:
                _rowwise(task, result, block[0], kept, unit)
            if unit and not sloped:
                own = coefficients_of(task, result, {unit: torch.ones_like(state.m[block[0]])}, block[0])
                block_gradient(task, result, own, block[0], kept, result.unit)
    result.state = state.rows(slice(n))
    if streamed is not None:
        result.unit = Gradients(streamed.gradients(result.state, task.target), [None] * len(need.weight), None)
    if ref_state is not None:
        result.reference = ref_state.common[:n]
    if "ref_lse" in task.names:
        result.values["ref_lse"] = ref_state.rows(slice(n)).lse.to(head.dtype)
    if "ref_logp" in task.names:
        result.values["ref_logp"] = ref_state.rows(slice(n)).read("logp", 1).to(head.dtype)
    return result


def _ids(n: int, padded: int, given: list[Tensor | None], device: torch.device) -> Tensor:
    parts = [part if part.dim() == 2 else part[:, None] for part in given if part is not None]
    ids = torch.cat(parts, 1) if parts else torch.zeros(n, 0, dtype=torch.int64, device=device)
    return torch.cat([ids, ids.new_zeros(padded - n, ids.shape[1])])


def _streams(task: Task, unit: str | None, need: Need | None) -> bool:
    """Whether the gradient to take in the forward is one that needs no logits kept (streamed.py)."""
    if unit != "logp" or need.head or task.divergences or task.rowwise:
        return False
    return task.passes.streams and task.head.softcap is None and "log_sum_p2" not in task.names


def _slopes(task: Task, unit: str | None) -> bool:
    """Whether the gradient to take in the forward is that of a divergence whose slope can stay where the logits were: torch
    computes it, nothing else reads them, and they are of one dtype."""
    if unit not in task.divergences or task.rowwise or task.head.softcap is not None:
        return False
    return task.passes.divergences is divergences and task.ref.dtype == task.head.dtype


def _fold(
    task: Task,
    head: Head,
    state: State,
    ids: Tensor,
    blocks: list[Block],
    kept: list[Tensor],
    scratch: Tensor,
    streamed: Streamed | None = None,
) -> None:
    """Project and fold all tiles of `blocks`; `kept` receives those of the first tiles, one tensor with all blocks each;
    `streamed` takes in the tiles, too."""
    parts = [(real, padded.stop - padded.start, state.rows(padded), ids[padded]) for real, padded in blocks]
    with exact_products(head.x):
        for j, (start, stop) in enumerate(task.tiles(head)):
            weights = tile_weights(head, start, stop)
            for real, rows, part, its_ids in parts:
                work = scratch[: rows * (stop - start)].view(rows, stop - start)
                at = real.start - blocks[0][0].start
                z = kept[j][at : at + rows] if j < len(kept) else work
                raw = task.passes.raw and head is task.head
                project(head, task.sizes, weights, start, real, z, raw=raw)
                merge = task.passes.fold(head if raw else None, part, z, start, real, its_ids, work)
                if streamed is not None:
                    streamed.add(weights, work, merge, real)
                if stop == task.edge:
                    part.common.copy_(part.lse)


def project(
    head: Head, sizes: Sizes, weights: list[Tensor], start: int, tokens: slice, z: Tensor, *, raw: bool = False
) -> None:
    """Logits of a block of tokens for the items from `start` into z, by products of one shape; `raw` as in `logits_tile`."""
    for first in range(0, len(z), sizes.rows):
        product = z[first : first + sizes.rows]
        rows = slice(tokens.start + first, min(tokens.start + first + len(product), tokens.stop))
        logits_tile(head, weights, start, rows, product, raw=raw)


def _rowwise(task: Task, result: Result, rows: slice, kept: list[list[Tensor]], unit: str | None) -> None:
    """The values of all Rowwise statistics but `unit`, whose value comes with its gradient."""
    for part in parts(task, rows):
        tokens = slice(rows.start + part.start, rows.start + part.stop)
        lp, lq = log_probs(task, result, tokens, part, kept)
        target = None if task.target is None else task.target[tokens]
        for name, entry in task.rowwise.items():
            if name != unit:
                values, others = entry(lp, lq, target)
                for its, numbers in {name: values, **others}.items():
                    result.values[its][tokens] = numbers
