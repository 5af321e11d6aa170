"""CPO: DPO with the reference left out (taken as uniform), plus the NLL of the chosen completions.

    loss = -log sigmoid(r_chosen - r_rejected) + alpha * NLL(chosen),   r = beta * log policy(y)

Rewards logged: r as it stands in the loss.

Source: Xu et al. 2024, "Contrastive Preference Optimization", arXiv:2401.08417, where the NLL is written -log policy(y), the
sum over tokens (`nll: sum`). The code of authors and TRL takes the mean over all chosen tokens of a batch, to which its alpha
of 1 belongs, and so does the default. The released recipe of ALMA-R scales the rejected side besides (ARPO); that is not this.
Value at policy == reference: depends on the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ...registry import objective
from ...schema import NonNegative, Positive
from ...stats import Loss, Pairs, reward_metrics


@dataclass(frozen=True, kw_only=True)
class CPOConfig:
    """Settings of CPO."""

    beta: Positive = 0.1
    """Scale of the rewards."""

    alpha: NonNegative = 1.0
    """Weight of the NLL of the chosen completions."""

    nll: Literal["tokens", "sum"] = "tokens"
    """The NLL: its mean over all chosen tokens of a step, or the mean over completions of the sum over their tokens."""


@objective(reference=False)
def cpo(config: CPOConfig, pairs: Pairs) -> Loss:
    chosen, rejected = config.beta * pairs.chosen.logp, config.beta * pairs.rejected.logp  # [B]
    losses = torch.nn.functional.softplus(rejected - chosen)  # [B]
    metrics = {**reward_metrics(chosen, rejected), "nll/chosen": -pairs.chosen.mean(pairs.chosen.logps).detach()}
    if config.nll == "sum":
        return Loss(losses - config.alpha * pairs.chosen.logp, metrics)
    return Loss(losses, metrics, plus=Loss(-config.alpha * pairs.chosen.logps.to(losses.dtype), per="chosen"))
