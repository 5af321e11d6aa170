"""AOT on unpaired data: chosen rewards should dominate rejected ones in distribution, quantile by quantile.

    loss = -(1 - eps) * log sigmoid(m) - eps * log sigmoid(-m)
    m = r_chosen - r_rejected of the same rank,   r = beta * sum_t log policy(y_t) - log reference(y_t)

The rank is that among the rows of one micro-batch, so which chosen completion came with which rejected one does not matter.
Rows affect each other, and the loss depends on `per_device_train_batch_size`, not only on the batch of a step; with 1 it is
DPO. Rewards logged: r of each row as its own pair; `aot/margins` is m.

Source: Melnyk et al. 2024, "Distributional Preference Alignment of LLMs via Optimal Transport", arXiv:2406.05882; TRL's
`aot_unpaired`. Both sides have to be of equal number, which they are here: rows are pairs.
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
class AOTUnpairedConfig:
    """Settings of AOT on unpaired data."""

    beta: Positive = 0.1
    """Pull to the reference; larger keeps the policy nearer."""

    label_smoothing: Probability = 0.0
    """Assumed share of flipped preferences."""


@objective(reference=True, start=math.log(2), coupled=True)
def aot_unpaired(config: AOTUnpairedConfig, pairs: Pairs) -> Loss:
    softplus = torch.nn.functional.softplus
    chosen, rejected = config.beta * pairs.chosen.logratio, config.beta * pairs.rejected.logratio  # [B]
    rank = chosen.argsort().argsort()
    margins = chosen - rejected.sort().values[rank]  # [B]
    eps = config.label_smoothing
    losses = (1 - eps) * softplus(-margins) + eps * softplus(margins)  # [B]
    return Loss(losses, {**reward_metrics(chosen, rejected), "aot/margins": margins.detach()})
