"""Token-level DPO: DPO with the forward KL of each completion, over the whole vocabulary, inside the margin.

    loss = -log sigmoid(r_chosen - r_rejected)
    version 1:  r = beta * (h + K)
    version 2:  r = beta * (h + alpha * K), without gradient through K of the chosen completion
    h = sum_t log policy(y_t) - log reference(y_t),   K = sum_t KL(reference || policy) at t

Rewards logged: r as it stands in the loss (the authors log beta * (h + K) for both versions).

Source: Zeng et al. 2024, arXiv:2404.11999. Version 2 is the method the paper recommends and the default; the authors' code
takes version 1 unless its configuration is edited.
Value at policy == reference: log 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from ...registry import objective
from ...schema import NonNegative, Positive
from ...stats import Loss, Pairs, reward_metrics


@dataclass(frozen=True, kw_only=True)
class TDPOConfig:
    """Settings of TDPO."""

    beta: Positive = 0.1
    """Pull to the reference; larger keeps the policy nearer."""

    version: Literal[1, 2] = 2
    """TDPO1 (gradient through both KLs, weight 1) or TDPO2 (not through that of the chosen completion, weight alpha)."""

    alpha: NonNegative = 0.5
    """Weight of the KLs in version 2; version 1 has none."""


@objective(reference=True, want=("forward_kl",), start=math.log(2))
def tdpo(config: TDPOConfig, pairs: Pairs) -> Loss:
    kl_chosen, kl_rejected = (one.sum(one["forward_kl"]) for one in (pairs.chosen, pairs.rejected))  # [B]
    held, weight = (kl_chosen.detach(), config.alpha) if config.version == 2 else (kl_chosen, 1.0)
    chosen = config.beta * (pairs.chosen.logratio + weight * held)  # [B]
    rejected = config.beta * (pairs.rejected.logratio + weight * kl_rejected)  # [B]
    metrics = {"kl/chosen": kl_chosen.detach(), "kl/rejected": kl_rejected.detach()}
    return Loss(torch.nn.functional.softplus(rejected - chosen), {**reward_metrics(chosen, rejected), **metrics})
