"""SimPO: the reward is the mean log-prob of a token, without a reference, and a pair has to be apart by a margin gamma.

    loss = -log sigmoid(r_chosen - r_rejected - gamma),   r = beta * log policy(y) / |y|

Rewards logged: r as it stands in the loss, before gamma.

Source: Meng et al. 2024, "SimPO: Simple Preference Optimization with a Reference-Free Reward", arXiv:2405.14734. The authors'
code takes `gamma_beta_ratio`, which is gamma / beta: its default of 0.25 at beta 2 is the gamma of 0.5 here.
Value at policy == reference: the mean of -log sigmoid(r_chosen - r_rejected - gamma), which depends on the data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...registry import objective
from ...schema import NonNegative, Positive
from ...stats import Completions, Loss, Pairs, reward_metrics


@dataclass(frozen=True, kw_only=True)
class SimPOConfig:
    """Settings of SimPO."""

    beta: Positive = 2.0
    """Scale of the reward; about 20 times the beta of DPO, since it multiplies means over tokens and not sums."""

    gamma: NonNegative = 0.5
    """Margin that the rewards of a pair should have; the authors' gamma_beta_ratio times beta."""


@objective(reference=False)
def simpo(config: SimPOConfig, pairs: Pairs) -> Loss:
    def reward(one: Completions) -> torch.Tensor:
        return config.beta * one.mean(one.logps)  # [B]

    chosen, rejected = reward(pairs.chosen), reward(pairs.rejected)
    return Loss(torch.nn.functional.softplus(config.gamma - chosen + rejected), reward_metrics(chosen, rejected))
