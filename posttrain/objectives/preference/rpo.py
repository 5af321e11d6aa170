"""RPO: DPO plus the NLL of the chosen completion, which keeps its likelihood from falling along with the rejected one's.

    loss = -log sigmoid(r_chosen - r_rejected) + eta * NLL(chosen),   r = beta * sum_t log policy(y_t) - log reference(y_t)

Three reductions of the NLL go by this name, and the same eta means very different strengths under them:
`sum`: beta times the sum over the completion's tokens, the form of the theory and of the authors' main code (eta 0.005);
`mean`: the mean over the completion's tokens, the authors' second code (eta 0.2, beta 0.5) and iterative RPO (eta 1);
`tokens`: the mean over all chosen tokens of the step, TRL. Rewards logged: r as it stands in the loss.

Source: Liu et al. 2024, "Provably Mitigating Overoptimization in RLHF: Your SFT Loss is Implicitly an Adversarial Regularizer",
arXiv:2405.16436; iterative RPO: Pang et al. 2024, arXiv:2404.19733.
Value at policy == reference: log 2 plus the NLL term, which depends on the data; log 2 where eta is 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from ...registry import objective
from ...schema import NonNegative, Positive
from ...stats import Loss, Pairs, reward_metrics

_ETA = {"sum": 0.005, "mean": 0.2, "tokens": 1.0}
"""Reduction -> the eta that its users have."""


@dataclass(frozen=True, kw_only=True)
class RPOConfig:
    """Settings of RPO."""

    beta: Positive = 0.01
    """Pull to the reference; larger keeps the policy nearer."""

    nll: Literal["sum", "mean", "tokens"] = "sum"
    """The NLL: beta times its sum over a completion, its mean over one, or its mean over all chosen tokens of a step."""

    eta: NonNegative | None = None
    """Weight of the NLL; null is 0.005 for sum, 0.2 for mean, 1 for tokens."""


def _eta(config: RPOConfig) -> float:
    return _ETA[config.nll] if config.eta is None else config.eta


@objective(reference=True, start=lambda config: None if _eta(config) else math.log(2))
def rpo(config: RPOConfig, pairs: Pairs) -> Loss:
    softplus = torch.nn.functional.softplus
    chosen, rejected = config.beta * pairs.chosen.logratio, config.beta * pairs.rejected.logratio  # [B]
    losses = softplus(rejected - chosen)  # [B]
    eta, mean = _eta(config), -pairs.chosen.mean(pairs.chosen.logps)
    metrics = {**reward_metrics(chosen, rejected), "nll/chosen": mean.detach()}
    if config.nll == "sum":
        return Loss(losses - eta * config.beta * pairs.chosen.logp, metrics)
    if config.nll == "mean":
        return Loss(losses + eta * mean, metrics)
    return Loss(losses, metrics, plus=Loss(-eta * pairs.chosen.logps.to(losses.dtype), per="chosen"))
