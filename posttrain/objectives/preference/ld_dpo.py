"""LD-DPO: DPO in which the tokens of the longer completion beyond the length of the shorter one count less.

    loss = -log sigmoid(r_chosen - r_rejected),   r = beta * sum_t w_t * (log policy(y_t) - log reference(y_t))
    w_t = 1 for t < min(|y_chosen|, |y_rejected|), else alpha

alpha = 1 is DPO; alpha = 0 leaves out what goes beyond the common length. Rewards logged: r as it stands in the loss.

Source: Liu et al. 2024, "Length Desensitization in Direct Preference Optimization", arXiv:2409.06411; TRL's `ld_alpha`.
Value at policy == reference: log 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...registry import objective
from ...schema import Positive, Probability
from ...stats import Completions, Loss, Pairs, reward_metrics


@dataclass(frozen=True, kw_only=True)
class LDDPOConfig:
    """Settings of LD-DPO."""

    beta: Positive = 0.1
    """Pull to the reference; larger keeps the policy nearer."""

    alpha: Probability = 0.5
    """Weight of the tokens beyond the common length; 1 is DPO."""


@objective(reference=True, start=math.log(2))
def ld_dpo(config: LDDPOConfig, pairs: Pairs) -> Loss:
    common = torch.minimum(pairs.chosen.lengths, pairs.rejected.lengths)  # [B]

    def reward(one: Completions) -> torch.Tensor:
        inside = one.position < one.spread(common)  # [N]
        return config.beta * one.sum(torch.where(inside, one.logratios, config.alpha * one.logratios))  # [B]

    chosen, rejected = reward(pairs.chosen), reward(pairs.rejected)
    return Loss(torch.nn.functional.softplus(rejected - chosen), reward_metrics(chosen, rejected))
