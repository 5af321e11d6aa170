"""Masks over tokens: numbers of completions made comparable, so that they can weigh their tokens."""

from __future__ import annotations

import torch


def rescaled(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Values of tokens brought to [0, 1] by the least and the largest of each completion; 1 where a completion's are all equal.

    Args:
        values: [N] or [N, k], each column by itself; in float32 or better.
        lengths: [B] tokens of each completion, summing to N.
    """
    low, high = (
        torch.segment_reduce(values, kind, lengths=lengths, unsafe=True).repeat_interleave(lengths, 0)
        for kind in ("min", "max")
    )
    spread = high - low
    return torch.where(spread > 0, (values - low) / spread.masked_fill(spread == 0, 1), 1)
