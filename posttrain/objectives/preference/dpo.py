"""Direct Preference Optimization under any f-divergence (f-DPO; reverse_kl is DPO), with label smoothing (cDPO).

    loss = -(1 - eps) * log sigmoid(m) - eps * log sigmoid(-m)
    m = beta * (s(h_chosen) - s(h_rejected)),   h = sum_t log policy(y_t) - log reference(y_t)

s(h) = f'(e^h) - f'(1), per divergence in divergences.py; the constant cancels in m and makes every logged reward 0 at the
start. Rewards logged: beta * s(h), the reward in the loss.

Source: Wang et al. 2024, arXiv:2309.16240, theorem 1 and table 1; DPO: Rafailov et al. 2023, arXiv:2305.18290, eq. 7;
cDPO: Mitchell 2023, "A note on DPO with noisy preferences", eq. 3. The authors' code keeps constants of f' that cancel in
the loss (forward KL: -1, alpha: -1/alpha), so its logged rewards differ by them; losses and gradients are the same.
Value at policy == reference: log 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...divergences import LinkName, divergence
from ...registry import objective
from ...schema import Positive, Probability
from ...stats import Loss, Pairs, reward_metrics


@dataclass(frozen=True, kw_only=True)
class DPOConfig:
    """Settings of DPO."""

    beta: Positive = 0.1
    """Pull to the reference; larger keeps the policy nearer."""

    divergence: LinkName = "reverse_kl"
    """Constraint between policy and reference."""

    label_smoothing: Probability = 0.0
    """Assumed share of pairs whose preference is flipped (cDPO); 0 is plain DPO."""


@objective(reference=True, start=math.log(2))
def dpo(config: DPOConfig, pairs: Pairs) -> Loss:
    f = divergence(config.divergence)
    h_chosen, h_rejected = pairs.chosen.logratio, pairs.rejected.logratio  # [B]
    chosen, rejected = config.beta * f.score(h_chosen), config.beta * f.score(h_rejected)  # [B]
    margins = chosen - rejected  # [B]
    softplus, eps = torch.nn.functional.softplus, config.label_smoothing
    losses = (1 - eps) * softplus(-margins) + eps * softplus(margins)  # [B]
    return Loss(
        losses,
        {**reward_metrics(chosen, rejected), "divergence/continued": (f.continued(h_chosen) + f.continued(h_rejected)) / 2},
    )
