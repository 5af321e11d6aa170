"""MMPO: DPO with soft labels made from the scores of the two completions, so that margins match score differences.

    loss = -q * log sigmoid(m) - (1 - q) * log sigmoid(-m),   q = sigmoid(gamma * (score_chosen - score_rejected))
    m = r_chosen - r_rejected,   r = beta * sum_t log policy(y_t) - log reference(y_t)

The optimum of a pair is m = gamma * (score_chosen - score_rejected); a tie has q = 1/2. The scores are columns of the data. A
row without them is an error, and a score of 0 is a score (the authors' code takes a q of 0 for none). Rewards logged: r as it
stands in the loss; `mmpo/target` is q and `mmpo/error` the squared difference between sigmoid(m) and it.

Source: Kim et al. 2024, "Margin Matching Preference Optimization: Enhanced Model Alignment with Granular Feedback",
arXiv:2410.03145, and the authors' code, where gamma is `bt_beta`: 2.2 and 0.3 on UltraFeedback, 1.1 on SHP.
Value at policy == reference: log 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...registry import objective
from ...schema import Positive
from ...stats import Loss, Pairs, reward_metrics


@dataclass(frozen=True, kw_only=True)
class ScoredPairs(Pairs):
    """Pairs with a score of each completion."""

    score_chosen: torch.Tensor
    """[B] that of the chosen completion, on the scale of the data."""

    score_rejected: torch.Tensor
    """[B] that of the rejected completion."""


@dataclass(frozen=True, kw_only=True)
class MMPOConfig:
    """Settings of MMPO."""

    beta: Positive = 0.01
    """Pull to the reference; larger keeps the policy nearer."""

    gamma: Positive = 2.2
    """Margin aimed at per unit of score difference; depends on the scale of the scores."""


@objective(reference=True, start=math.log(2))
def mmpo(config: MMPOConfig, pairs: ScoredPairs) -> Loss:
    softplus = torch.nn.functional.softplus
    chosen, rejected = config.beta * pairs.chosen.logratio, config.beta * pairs.rejected.logratio  # [B]
    margins = chosen - rejected  # [B]
    wanted = config.gamma * (pairs.score_chosen - pairs.score_rejected).to(margins.dtype)  # [B]
    losses = wanted.sigmoid() * softplus(-margins) + (-wanted).sigmoid() * softplus(margins)  # [B]
    errors = (margins.detach().sigmoid() - wanted.sigmoid()).square()
    return Loss(losses, {**reward_metrics(chosen, rejected), "mmpo/target": wanted.sigmoid(), "mmpo/error": errors})
