"""AOT on paired data: the policy's margins should dominate the reference's in distribution, quantile by quantile.

    loss = -(1 - eps) * log sigmoid(m) - eps * log sigmoid(-m)
    m = beta * (d - ref_d),   d = log policy(y_chosen) - log policy(y_rejected), ref_d the reference's of the same rank

The rank is that among the rows of one micro-batch, the exact optimal transport in one dimension. So rows affect each other, and
the loss depends on `per_device_train_batch_size`, not only on the batch of a step; with 1 it is DPO. Rewards logged: beta times
the log-ratios of the row itself, as for DPO; `aot/margins` is m.

Source: Melnyk et al. 2024, "Distributional Preference Alignment of LLMs via Optimal Transport", arXiv:2406.05882; TRL's `aot`.
Without pairs: `aot_unpaired`.
Value at policy == reference: log 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...registry import objective
from ...schema import Positive, Probability
from ...stats import Loss, Pairs, reward_metrics


@dataclass(frozen=True, kw_only=True)
class AOTConfig:
    """Settings of AOT on paired data."""

    beta: Positive = 0.1
    """Pull to the reference; larger keeps the policy nearer."""

    label_smoothing: Probability = 0.0
    """Assumed share of flipped preferences."""


@objective(reference=True, start=math.log(2), coupled=True)
def aot(config: AOTConfig, pairs: Pairs) -> Loss:
    softplus = torch.nn.functional.softplus
    policy = pairs.chosen.logp - pairs.rejected.logp  # [B]
    reference = pairs.chosen.reference_logp - pairs.rejected.reference_logp  # [B]
    rank = policy.argsort().argsort()
    margins = config.beta * (policy - reference.sort().values[rank])  # [B]
    eps = config.label_smoothing
    losses = (1 - eps) * softplus(-margins) + eps * softplus(margins)  # [B]
    rewards = reward_metrics(config.beta * pairs.chosen.logratio, config.beta * pairs.rejected.logratio)
    return Loss(losses, {**rewards, "aot/margins": margins.detach()})
