"""APO-down: lower the likelihood of both completions, that of the rejected one more.

    loss = sigmoid(r_chosen) + sigmoid(r_rejected - r_chosen),   r = beta * sum_t log policy(y_t) - log reference(y_t)

For data whose chosen completions are worse than what the policy writes; for the other case see `apo_zero`. Both terms are
bounded, so completions far from the reference have next to no gradient. Rewards logged: r as it stands in the loss.

Source: D'Oosterlinck et al. 2024, "Anchored Preference Optimization and Contrastive Revisions", arXiv:2408.06266; TRL's
`apo_down`.
Value at policy == reference: 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...registry import objective
from ...schema import Positive
from ...stats import Loss, Pairs, reward_metrics


@dataclass(frozen=True, kw_only=True)
class APODownConfig:
    """Settings of APO-down."""

    beta: Positive = 0.1
    """Pull to the reference; larger keeps the policy nearer."""


@objective(reference=True, start=1.0)
def apo_down(config: APODownConfig, pairs: Pairs) -> Loss:
    logsigmoid = torch.nn.functional.logsigmoid
    chosen, rejected = config.beta * pairs.chosen.logratio, config.beta * pairs.rejected.logratio  # [B]
    # sigmoid as exp(logsigmoid): torch differentiates sigmoid as y * (1 - y), which is 0 once y rounds to 1
    losses = logsigmoid(chosen).exp() + logsigmoid(rejected - chosen).exp()  # [B]
    return Loss(losses, reward_metrics(chosen, rejected))
