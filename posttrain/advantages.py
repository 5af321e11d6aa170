"""Advantages: how much better a completion, or a token of it, was than could be expected.

Of the scores r of a group of G completions of one prompt, m their mean, s their standard deviation (unbiased):

    rloo     r - mean of the others = G / (G - 1) (r - m)
    grpo     (r - m) / (s + eps)
    dr_grpo  r - m
    opo      r - sum of length * r / sum of length
    qae      (r - q) / (s + eps), q a quantile of the group's scores
    aapo     (r - m) / (s + eps) + clip(r - r', -0.2, 0.28), r' the score of a completion of the reference

and of rewards r_t and values V_t of tokens, V = 0 after the last one:

    gae      A_t = sum over k of (gamma lambda)^k d_(t+k),   d_t = r_t + gamma V_(t+1) - V_t

Dividing by s makes a group count the same however far its scores are apart, so that what is learned is no longer the gradient
of the expected score (Dr. GRPO); grpo and qae do it, as their authors do.

Source: rloo: Kool et al. 2019; Ahmadian et al. 2024, arXiv:2402.14740. grpo: Shao et al. 2024, arXiv:2402.03300. dr_grpo: Liu
et al. 2025, arXiv:2503.20783. opo: Hao et al. 2025, arXiv:2505.23585. qae: Wu et al. 2025, arXiv:2509.22611. aapo: Xiong et al.
2025, arXiv:2505.14264. gae: Schulman et al. 2016, arXiv:1506.02438; whitened as in OpenAI's lm-human-preferences. Global
whitening of returns: Hu et al. 2025, "REINFORCE++", arXiv:2501.03262.

Letters in shape comments: B completions, prompt after prompt; N tokens of all of them end to end.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .stats import wide

_TINY = 1e-8
"""Added to a variance before its root is taken."""


def grouped(values: torch.Tensor, group: int) -> torch.Tensor:
    """[B] -> [B / G, G], a row a prompt."""
    return wide(values).view(len(values) // group, group)


def _deviation(rows: torch.Tensor) -> torch.Tensor:
    """[B / G, 1] the unbiased standard deviation of each row."""
    return ((rows - rows.mean(1, keepdim=True)).square().sum(1, keepdim=True) / (rows.shape[1] - 1)).sqrt()


def rloo(scores: torch.Tensor, group: int) -> torch.Tensor:
    """[B] the score minus the mean of the others of its group (G > 1)."""
    rows = grouped(scores, group)
    return ((rows - rows.mean(1, keepdim=True)) * (group / (group - 1))).flatten()


def dr_grpo(scores: torch.Tensor, group: int) -> torch.Tensor:
    """[B] the score minus the mean of its group."""
    rows = grouped(scores, group)
    return (rows - rows.mean(1, keepdim=True)).flatten()


def grpo(scores: torch.Tensor, group: int, eps: float = 1e-4) -> torch.Tensor:
    """[B] the score minus the mean of its group, by its standard deviation (G > 1); eps as in TRL, verl has 1e-6."""
    rows = grouped(scores, group)
    return ((rows - rows.mean(1, keepdim=True)) / (_deviation(rows) + eps)).flatten()


def opo(scores: torch.Tensor, group: int, lengths: torch.Tensor) -> torch.Tensor:
    """[B] the score minus the mean of its group weighted by length, the baseline of least variance under its assumptions."""
    rows, size = grouped(scores, group), grouped(lengths, group)
    return (rows - (rows * size).sum(1, keepdim=True) / size.sum(1, keepdim=True).clamp(min=1)).flatten()


def qae(
    scores: torch.Tensor, group: int, quantile: float = 0.4, *, interpolated: bool = False, eps: float = 1e-6
) -> torch.Tensor:
    """[B] the score minus a quantile of its group, by its standard deviation (G > 1).

    With scores 0 and 1 a prompt that mostly fails rewards its rare successes, one that mostly succeeds punishes its failures.

    Args:
        quantile: K, the baseline is the smallest score that at least this share of the group does not exceed.
        interpolated: the authors' code instead, which interpolates between two scores, so that the two kinds may both count.
    """
    rows = grouped(scores, group)
    if interpolated:
        baseline = torch.quantile(rows, quantile, dim=1, keepdim=True)
    else:
        place = max(math.ceil(quantile * group - 1e-9), 1) - 1  # 0.6 * 5 may be above 3
        baseline = rows.sort(1).values[:, place : place + 1]
    return ((rows - baseline) / (_deviation(rows) + eps)).flatten()


def aapo(
    scores: torch.Tensor,
    reference_scores: torch.Tensor,
    group: int,
    *,
    low: float = -0.2,
    high: float = 0.28,
    eps: float = 1e-4,
) -> torch.Tensor:
    """[B] grpo's advantage, plus by how much the completion beats one of the reference for the same place, within bounds.

    Args:
        reference_scores: [B] the scores of the reference's completions.
    """
    return grpo(scores, group, eps) + (wide(scores) - wide(reference_scores)).clamp(low, high)


def gae(
    rewards: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor, gamma: float = 1.0, lam: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """[N] the advantages, not whitened, and [N] the returns, their sum with the values: what a critic is to predict.

    Args:
        rewards, values: [N] of each token.
        lengths: [B] tokens of each completion.
    """
    rewards, values = wide(rewards), wide(values)
    longest = max(lengths.tolist(), default=0)
    there = torch.arange(longest, device=lengths.device) < lengths[:, None]  # [B, T]
    padded = rewards.new_zeros(2, *there.shape)
    padded[0][there], padded[1][there] = rewards, values
    found, after, ahead = torch.zeros_like(padded[0]), padded.new_zeros(len(lengths)), padded.new_zeros(len(lengths))
    for t in reversed(range(longest)):
        reward, value = padded[:, :, t]
        found[:, t] = after = reward + gamma * ahead - value + gamma * lam * after
        ahead = value
    advantages = found[there]
    return advantages, advantages + values


def returns_to_go(rewards: torch.Tensor, lengths: torch.Tensor, gamma: float = 1.0) -> torch.Tensor:
    """[N] the sum of the rewards from each token to the end of its completion, discounted."""
    return gae(rewards, torch.zeros_like(rewards), lengths, gamma)[0]


def whitened(values: torch.Tensor, mask: torch.Tensor, total: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """[N] values minus their mean, by their standard deviation (unbiased), over the masked tokens of all processes.

    Args:
        mask: [N] bool.
        total: the sum of a tensor over all processes.
    """
    values = wide(values)
    chosen = values[mask].double()
    count, whole = total(torch.stack([chosen.new_tensor(chosen.numel()), chosen.sum()])).unbind()
    mean = whole / count.clamp(min=1)
    variance = total((chosen - mean).square().sum()) / (count - 1).clamp(min=1)
    return ((values - mean) * (variance + _TINY).rsqrt()).to(values.dtype)
