"""SPPO with estimated probabilities: regression of each log-ratio onto how often its completion beats the policy.

    loss = ((h_chosen - (p_chosen - 1/2) / beta)^2 + (h_rejected - (p_rejected - 1/2) / beta)^2) / 2
    h = sum_t log policy(y_t) - log reference(y_t)

p are columns of the data, `chosen_win` and `rejected_win`: the probability, by a preference model, that the completion beats
one of the last iteration's policy, which is the reference. beta is 1 / eta of the paper. Rewards logged: beta * h, of which
the loss wants p - 1/2.

Source: Wu et al. 2024, "Self-Play Preference Optimization for Language Model Alignment", arXiv:2405.00675, eq. 4.7; the
authors' code (`sppo`), whose columns are chosen_probs_win and chosen_probs_lose. Without such columns: `sppo`.
Value at policy == reference: the mean of ((p_chosen - 1/2)^2 + (p_rejected - 1/2)^2) / (2 * beta^2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...registry import objective
from ...schema import Positive
from ...stats import Loss, Pairs, reward_metrics


@dataclass(frozen=True, kw_only=True)
class PairsWithWins(Pairs):
    """Pairs with the probability of each completion to beat one of the policy."""

    chosen_win: torch.Tensor
    """[B] that of the chosen completion, in [0, 1]."""

    rejected_win: torch.Tensor
    """[B] that of the rejected completion, in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class SPPOSoftConfig:
    """Settings of SPPO with estimated probabilities."""

    beta: Positive = 0.001
    """Pull to the reference; the log-ratio aimed at is (p - 1/2) / beta."""


@objective(reference=True)
def sppo_soft(config: SPPOSoftConfig, pairs: PairsWithWins) -> Loss:
    h_chosen, h_rejected = pairs.chosen.logratio, pairs.rejected.logratio  # [B]
    target_chosen, target_rejected = (
        (win.to(h_chosen.dtype) - 0.5) / config.beta for win in (pairs.chosen_win, pairs.rejected_win)
    )  # [B]
    losses = ((h_chosen - target_chosen).square() + (h_rejected - target_rejected).square()) / 2  # [B]
    return Loss(losses, reward_metrics(config.beta * h_chosen, config.beta * h_rejected))
