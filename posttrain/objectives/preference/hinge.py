"""Hinge loss on the margin of DPO's rewards (SLiC normalised by the reference): pairs apart by 1 or more are left alone.

    loss = max(0, 1 - (r_chosen - r_rejected)),   r = beta * sum_t log policy(y_t) - log reference(y_t)

Rewards logged: r as it stands in the loss; `hinge/satisfied` is the share of pairs that no longer have a gradient.

Source: Liu et al. 2023, "Statistical Rejection Sampling Improves Preference Optimization", arXiv:2309.06657 (hinge-norm), after
the hinge of SLiC-HF, arXiv:2305.10425, which has no reference and is `slic` here; TRL's `hinge`.
Value at policy == reference: 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...registry import objective
from ...schema import Positive
from ...stats import Loss, Pairs, reward_metrics


@dataclass(frozen=True, kw_only=True)
class HingeConfig:
    """Settings of the hinge loss."""

    beta: Positive = 0.1
    """Pull to the reference; the margin of log-ratios aimed at is 1 / beta."""


@objective(reference=True, start=1.0)
def hinge(config: HingeConfig, pairs: Pairs) -> Loss:
    chosen, rejected = config.beta * pairs.chosen.logratio, config.beta * pairs.rejected.logratio  # [B]
    losses = (1 - (chosen - rejected)).relu()  # [B]
    satisfied = (losses.detach() == 0).to(losses.dtype)
    return Loss(losses, {**reward_metrics(chosen, rejected), "hinge/satisfied": satisfied})
