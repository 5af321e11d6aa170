"""The same statistics in blocks of tokens, so that only one block's logits exist at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .dense import dense_stats
from .head import Head, Want


def _rows(head: Head | None, rows: slice) -> Head | None:
    if head is None:
        return None
    temperature = head.temperature
    if isinstance(temperature, Tensor) and temperature.dim():
        temperature = temperature[rows]
    extra = tuple((x[rows], weight) for x, weight in head.extra)
    return dataclasses.replace(head, x=head.x[rows], extra=extra, temperature=temperature)


def chunked_stats(
    head: Head, want: Sequence[Want], *, target: Tensor | None, index: Tensor | None, ref: Head | None, workspace: int | None
) -> dict[str, Tensor]:
    """`head_stats` in blocks of tokens."""
    block = 128

    def run(rows: slice) -> dict[str, Tensor]:
        return dense_stats(
            _rows(head, rows),
            want,
            target=None if target is None else target[rows],
            index=None if index is None else index[rows],
            ref=_rows(ref, rows),
        )

    parts = [
        checkpoint(run, slice(start, start + block), use_reentrant=False) for start in range(0, max(len(head.x), 1), block)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
