"""APO-zero on single completions: KTO measured against zero, which needs no mismatched completions and so no extra pass.

    loss = lambda_D * sigmoid(-beta * h)  where the completion is desirable
    loss = lambda_U * sigmoid(beta * h)   where it is not,   h = sum_t log policy(y_t) - log reference(y_t)

For data whose desirable completions are better than what the policy writes: their likelihood is raised, whatever becomes of the
others. Rewards logged: beta * h.

Source: D'Oosterlinck et al. 2024, "Anchored Preference Optimization and Contrastive Revisions", arXiv:2408.06266, the two terms
of APO-zero on a row each; TRL's `apo_zero_unpaired`.
Value at policy == reference: lambda_D / 2 for desirable rows, lambda_U / 2 for the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...registry import objective
from ...schema import NonNegative, Positive
from ...stats import Labelled, Loss, label_metrics


@dataclass(frozen=True, kw_only=True)
class APOZeroUnpairedConfig:
    """Settings of APO-zero on single completions."""

    beta: Positive = 0.1
    """Pull to the reference; larger keeps the policy nearer."""

    desirable_weight: NonNegative = 1.0
    """lambda_D, the weight of desirable rows."""

    undesirable_weight: NonNegative = 1.0
    """lambda_U, the weight of undesirable rows."""


def _start(config: APOZeroUnpairedConfig) -> float | None:
    return config.desirable_weight / 2 if config.desirable_weight == config.undesirable_weight else None


@objective(reference=True, start=_start)
def apo_zero_unpaired(config: APOZeroUnpairedConfig, rows: Labelled) -> Loss:
    rewards = config.beta * rows.completion.logratio  # [B]
    label = rows.label.to(rewards.dtype)  # [B]
    weight = config.desirable_weight * label + config.undesirable_weight * (1 - label)  # [B]
    losses = weight * torch.sigmoid((1 - 2 * label) * rewards)  # [B]
    return Loss(losses, label_metrics(rewards, label))
