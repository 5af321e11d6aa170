"""SPPO with hard probabilities: regression of each log-ratio onto a win (chosen) or a loss (rejected) against the policy.

    loss = ((h_chosen - 1 / (2 * beta))^2 + (h_rejected + 1 / (2 * beta))^2) / 2
    h = sum_t log policy(y_t) - log reference(y_t)

beta is 1 / eta of the paper. Rewards logged: beta * h, of which the loss wants 1/2 and -1/2. The reference is the policy of the
last iteration; the probability that a completion beats it is taken as 1 for the chosen, 0 for the rejected one. With estimated
probabilities: `sppo_soft`.

Source: Wu et al. 2024, "Self-Play Preference Optimization for Language Model Alignment", arXiv:2405.00675, eq. 4.7; the mean of
the two squares is the paper's mean over completions and the authors' code (`sppo_single`). TRL's `sppo_hard` takes their sum,
twice the loss: `total`.
Value at policy == reference: 1 / (4 * beta^2); twice that with `total`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...registry import objective
from ...schema import Positive
from ...stats import Loss, Pairs, reward_metrics


@dataclass(frozen=True, kw_only=True)
class SPPOConfig:
    """Settings of SPPO with hard probabilities."""

    beta: Positive = 0.001
    """Pull to the reference; the log-ratios aimed at are 1 / (2 * beta) and its negative."""

    total: bool = False
    """Sum in place of mean of the two squares, as TRL has it."""


def _factor(config: SPPOConfig) -> float:
    return 1.0 if config.total else 0.5


@objective(reference=True, start=lambda config: 2 * _factor(config) * (1 / (2 * config.beta)) ** 2)
def sppo(config: SPPOConfig, pairs: Pairs) -> Loss:
    h_chosen, h_rejected = pairs.chosen.logratio, pairs.rejected.logratio  # [B]
    target = 1 / (2 * config.beta)
    losses = _factor(config) * ((h_chosen - target).square() + (h_rejected + target).square())  # [B]
    return Loss(losses, reward_metrics(config.beta * h_chosen, config.beta * h_rejected))
