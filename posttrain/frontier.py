"""What a policy gained and how far it went for it: numbers of sampled completions, with their standard errors.

A quantity of a completion is averaged over all of them. Completions of one prompt are alike, so the standard error is that of
the means of the prompts. Letters in shape comments: P prompts, n completions of each, B = P n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def mean_and_error(values: Sequence[float], n: int) -> tuple[float, float]:
    """The mean of [B] values, prompt after prompt, and its standard error over prompts; NaN for a single prompt."""
    means = torch.tensor(values, dtype=torch.float64).view(-1, n).mean(1)  # [P]
    error = means.std().item() / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return means.mean().item(), error


def wins(scores: Sequence[float], others: Sequence[float], n: int) -> list[float]:
    """[B] how many of the n other completions of its prompt each completion is scored above, as a share; a tie counts half."""
    ours, theirs = (torch.tensor(side, dtype=torch.float64).view(-1, n) for side in (scores, others))  # [P, n]
    return (((ours[:, :, None] - theirs[:, None, :]).sign() + 1) / 2).mean(2).flatten().tolist()


def distinct(texts: Sequence[str], n: int) -> float:
    """The share of different ones among all n-grams of words of all texts: it falls as they repeat themselves or each other,
    and with their number; 0 without any. (Li et al. 2016, arXiv:1510.03055.)"""
    words = [text.split() for text in texts]
    grams = [tuple(one[at : at + n]) for one in words for at in range(len(one) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
