"""Identity Preference Optimization: regression of the log-ratio margin onto a target, so that it cannot grow without bound.

    loss = (h_chosen - h_rejected - 1 / (2 * beta))^2,   h = sum_t log policy(y_t) - log reference(y_t)

beta is the tau of the paper. Rewards logged: beta * h, the reward of which the loss wants a margin of 1/2.

Source: Azar et al. 2023, arXiv:2310.12036, eq. 17; token sums as in the paper and in the code of Rafailov et al. TRL and HALOs
take the mean over the tokens of each completion instead: `length_normalised`.
Value at policy == reference: 1 / (4 * beta^2).
"""

from __future__ import annotations

from dataclasses import dataclass

from ...registry import objective
from ...schema import Positive
from ...stats import Loss, Pairs, reward_metrics


@dataclass(frozen=True, kw_only=True)
class IPOConfig:
    """Settings of IPO."""

    beta: Positive = 0.1
    """Pull to the reference; the margin of log-ratios aimed at is 1 / (2 * beta)."""

    length_normalised: bool = False
    """Mean in place of sum over the tokens of a completion, as TRL and HALOs have it."""


@objective(reference=True, start=lambda config: 1 / (4 * config.beta**2))
def ipo(config: IPOConfig, pairs: Pairs) -> Loss:
    h_chosen, h_rejected = (
        one.mean(one.logratios) if config.length_normalised else one.logratio for one in (pairs.chosen, pairs.rejected)
    )  # [B]
    losses = (h_chosen - h_rejected - 1 / (2 * config.beta)).square()  # [B]
    return Loss(losses, reward_metrics(config.beta * h_chosen, config.beta * h_rejected))
