"""DiscoPOP: a loss found by a language model's search, a blend of DPO's logistic loss and an exponential one.

    loss = (1 - w) * -log sigmoid(m) + w * e^-m,   w = sigmoid(m / tau)
    m = r_chosen - r_rejected,   r = beta * sum_t log policy(y_t) - log reference(y_t)

w e^-m is computed as exp(log sigmoid(m / tau) - m), which is finite for any m where tau < 1. The loss is not convex: at tau
0.05 it has a local minimum at m = -0.1186 and a local maximum at 0.0720, so pairs can come to rest in the wrong order.
Rewards logged: r as it stands in the loss.

Source: Lu et al. 2024, "Discovering Preference Optimization Algorithms with and for Large Language Models", arXiv:2406.08414
(log-ratio modulated loss); TRL's `discopop`, whose product of 0 and infinity it avoids.
Value at policy == reference: (1 + log 2) / 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...registry import objective
from ...schema import OpenUnit, Positive
from ...stats import Loss, Pairs, reward_metrics


@dataclass(frozen=True, kw_only=True)
class DiscoPOPConfig:
    """Settings of DiscoPOP."""

    beta: Positive = 0.05
    """Pull to the reference; larger keeps the policy nearer."""

    tau: OpenUnit = 0.05
    """Width of the blend between the two losses, in units of the margin."""


@objective(reference=True, start=(1 + math.log(2)) / 2)
def discopop(config: DiscoPOPConfig, pairs: Pairs) -> Loss:
    logsigmoid, softplus = torch.nn.functional.logsigmoid, torch.nn.functional.softplus
    chosen, rejected = config.beta * pairs.chosen.logratio, config.beta * pairs.rejected.logratio  # [B]
    margins = chosen - rejected  # [B]
    logistic = (-margins / config.tau).sigmoid() * softplus(-margins)
    exponential = (logsigmoid(margins / config.tau) - margins).exp()
    return Loss(logistic + exponential, reward_metrics(chosen, rejected))
