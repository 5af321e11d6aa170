"""The likeliest items of every token."""

from __future__ import annotations

import torch
from torch import Tensor

from .chunked import sizes_of, workspace_of
from .fold import State
from .forward import project
from .head import Head, check_shapes
from .memory import with_less
from .project import exact_products, tile_weights
from .task import Sizes


@torch.no_grad()
def top_k(head: Head, k: int, *, workspace: int | None = None) -> tuple[Tensor, Tensor]:
    """The k likeliest items of every token and their log-probs, without gradient.

    `gather` of `head_stats` gives the log-probs of another head at these ids, with gradient.

    Args:
        workspace: bytes of temporary memory to aim at, beside the results.

    Returns:
        ids [N, k] int64, the likeliest first (the order of equal ones is arbitrary), and log-probs [N, k], which have the
        bits that `gather` would give under `chunked`.

    Raises:
        ValueError: k is not within the vocabulary, or shapes that do not fit.
    """
    check_shapes("head", head, len(head.x))
    if not 1 <= k <= head.size:
        raise ValueError(f"k: {k} is not within 1 and the {head.size} items of the vocabulary")
    return with_less(
        lambda space: _top_k(head, k, sizes_of(head, space, temporaries=1, whole=0)),
        workspace_of(head, workspace),
        head.x.device,
    )


def _top_k(head: Head, k: int, sizes: Sizes) -> tuple[Tensor, Tensor]:
    n = len(head.x)
    blocks = sizes.blocks(n, sizes.block)
    no_ids = torch.zeros(blocks[-1][1].stop if blocks else 0, 0, dtype=torch.int64, device=head.x.device)
    state = State.empty(no_ids, head.dtype, set())
    best = [(state.m.new_empty(len(no_ids[padded]), 0), no_ids[padded]) for _, padded in blocks]  # logits, ids
    scratch = state.m.new_empty(max((len(values) for values, _ in best), default=0) * sizes.items)
    with exact_products(head.x):
        for start, stop in sizes.tiles(head.size, head.size):
            weights = tile_weights(head, start, stop)
            for i, (real, padded) in enumerate(blocks):
                rows = padded.stop - padded.start
                z = scratch[: rows * (stop - start)].view(rows, stop - start)
                project(head, sizes, weights, start, real, z)
                best[i] = _merge(best[i], z, start, k)
                state.rows(padded).fold(z, start, no_ids[padded], z)
    values = torch.cat([values for values, _ in best])[:n] if best else state.m.new_empty(0, k)
    ids = torch.cat([ids for _, ids in best])[:n] if best else no_ids.new_empty(0, k)
    state = state.rows(slice(n))
    return ids, (values - state.m[:, None]) - state.r.log1p()[:, None]


def _merge(best: tuple[Tensor, Tensor], z: Tensor, start: int, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of those so far and of a tile."""
    found, columns = z.topk(min(k, z.shape[1]))
    values, ids = torch.cat([best[0], found], 1), torch.cat([best[1], columns + start], 1)
    values, order = values.topk(min(k, values.shape[1]))
    return values, ids.gather(1, order)
