"""NCA: noise contrast of each completion against the reference, so that the chosen reward itself, not just the margin, rises.

    loss = -log sigmoid(r_chosen) - (log sigmoid(-r_chosen) + log sigmoid(-r_rejected)) / 2
    r = beta * sum_t log policy(y_t) - log reference(y_t)

`biased` leaves out the pull of chosen completions towards 0: -log sigmoid(r_chosen) - log sigmoid(-r_rejected), the authors'
biased NCA, which is also TRL's `bco_pair` (BCO without its shift). Rewards logged: r as it stands in the loss.

Source: Chen et al. 2024, "Noise Contrastive Alignment of Language Models with Explicit Rewards", arXiv:2402.05369; the authors'
pairwise trainer.
Value at policy == reference: 2 log 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...registry import objective
from ...schema import Positive
from ...stats import Loss, Pairs, reward_metrics


@dataclass(frozen=True, kw_only=True)
class NCAConfig:
    """Settings of NCA."""

    beta: Positive = 0.01
    """Pull to the reference; larger keeps the policy nearer."""

    biased: bool = False
    """Only raise the chosen reward and lower the rejected one."""


@objective(reference=True, start=2 * math.log(2))
def nca(config: NCAConfig, pairs: Pairs) -> Loss:
    softplus = torch.nn.functional.softplus
    chosen, rejected = config.beta * pairs.chosen.logratio, config.beta * pairs.rejected.logratio  # [B]
    noise = softplus(rejected) if config.biased else (softplus(chosen) + softplus(rejected)) / 2
    return Loss(softplus(-chosen) + noise, reward_metrics(chosen, rejected))
