"""Binary Classifier Optimization: a classifier of chosen against rejected completions, whose logit is the implied reward.

    loss = (-log sigmoid(r_chosen - delta) - log sigmoid(delta - r_rejected)) / 2
    r = beta * sum_t log policy(y_t) - log reference(y_t)

delta is the running mean of all rewards, chosen and rejected, without gradient, over all rows of all earlier optimizer steps: 0
in the first, where the rewards are 0. Checkpoints keep it. TRL counts the micro-batch at hand, too, so that there it depends on
how a batch is split; with the same delta losses and gradients are the same. The paper's density-ratio weight of the rejected
side, for feedback whose two kinds come from different prompts, has no use on pairs. Rewards logged: r.

Source: Jung et al. 2024, "Binary Classifier Optimization for Large Language Model Alignment", arXiv:2404.04656; TRL's
`BCOTrainer`, whose mean over completions is the mean over pairs here.
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
class BCOConfig:
    """Settings of BCO."""

    beta: Positive = 0.1
    """Pull to the reference; larger keeps the policy nearer."""


@objective(reference=True, start=math.log(2))
def bco(config: BCOConfig, pairs: Pairs) -> Loss:
    softplus = torch.nn.functional.softplus
    chosen, rejected = config.beta * pairs.chosen.logratio, config.beta * pairs.rejected.logratio  # [B]
    delta = pairs.context.get("delta", chosen.new_zeros(()))
    losses = (softplus(delta - chosen) + softplus(rejected - delta)) / 2  # [B]
    metrics = {**reward_metrics(chosen, rejected), "bco/delta": delta}
    return Loss(losses, metrics, remember={"delta": torch.cat([chosen, rejected]).detach()})
