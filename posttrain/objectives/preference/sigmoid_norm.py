"""Length-normalised DPO: the mean log-ratio of a token in place of the sum over the completion.

    loss = -log sigmoid(r_chosen - r_rejected),   r = beta * h / |y|,   h = sum_t log policy(y_t) - log reference(y_t)

Long completions have no longer a larger say. Since means are some hundred times smaller than sums, so much larger is beta.
Rewards logged: r as it stands in the loss.

Source: TRL's `sigmoid_norm`; used with beta 5 by Lambert et al. 2024, "Tulu 3", arXiv:2411.15124. Without a reference: `simpo`.
Value at policy == reference: log 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...registry import objective
from ...schema import Positive
from ...stats import Completions, Loss, Pairs, reward_metrics


@dataclass(frozen=True, kw_only=True)
class SigmoidNormConfig:
    """Settings of length-normalised DPO."""

    beta: Positive = 5.0
    """Pull to the reference, per token; larger keeps the policy nearer."""


@objective(reference=True, start=math.log(2))
def sigmoid_norm(config: SigmoidNormConfig, pairs: Pairs) -> Loss:
    def reward(one: Completions) -> torch.Tensor:
        return config.beta * one.mean(one.logratios)  # [B]

    chosen, rejected = reward(pairs.chosen), reward(pairs.rejected)
    return Loss(torch.nn.functional.softplus(rejected - chosen), reward_metrics(chosen, rejected))
