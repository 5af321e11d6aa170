"""H-DPO: DPO with a weight on the policy's entropy in the constraint; alpha < 1 sharpens, alpha > 1 keeps it diverse.

    loss = -log sigmoid(r_chosen - r_rejected),   r = beta * (alpha * log policy(y) - log reference(y))

The constraint is -alpha H(policy) + CE(policy, reference), so the optimum is proportional to reference^(1/alpha) *
exp(r / (alpha * beta)); alpha = 1 is DPO. Rewards logged: r as it stands in the loss. It equals beta * alpha * h plus the
`length_term` beta * (1 - alpha) * -log reference(y), h being the log-ratio: a bonus (alpha < 1) for long and unlikely
completions that is there from the start. It is logged, since it is hundreds of nats long where beta * |1 - alpha| is not small.

Source: Omura et al. 2024, arXiv:2411.07595: the DPO derivation from the constraint above. There is no code of the authors.
Value at policy == reference: the mean of -log sigmoid(length_term_chosen - length_term_rejected); log 2 for alpha = 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...registry import objective
from ...schema import Positive
from ...stats import Completions, Loss, Pairs, reward_metrics


@dataclass(frozen=True, kw_only=True)
class HDPOConfig:
    """Settings of H-DPO."""

    beta: Positive = 0.1
    """Pull to the reference; larger keeps the policy nearer."""

    alpha: Positive = 0.95
    """Weight of the entropy; below 1 the policy becomes sharper than under DPO, above 1 more diverse."""


@objective(reference=True, want=("entropy",), start=lambda config: math.log(2) if config.alpha == 1 else None)
def hdpo(config: HDPOConfig, pairs: Pairs) -> Loss:
    def reward(one: Completions) -> torch.Tensor:
        return config.beta * (config.alpha * one.logp - one.reference_logp)  # [B]

    chosen, rejected = reward(pairs.chosen), reward(pairs.rejected)
    bonus = config.beta * (config.alpha - 1)
    metrics = {
        **reward_metrics(chosen, rejected),
        "length_term/chosen": bonus * pairs.chosen.reference_logp,
        "length_term/rejected": bonus * pairs.rejected.reference_logp,
        "entropy": torch.cat([pairs.chosen["entropy"], pairs.rejected["entropy"]]).detach(),  # [N]
    }
    return Loss(torch.nn.functional.softplus(rejected - chosen), metrics)
