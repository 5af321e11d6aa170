"""ORPO: supervised fine-tuning on the chosen completions plus the log-ratio of odds between chosen and rejected; no reference.

    loss = NLL(chosen) - lam * log sigmoid(o_chosen - o_rejected)
    o = a - log(1 - e^a),   a = log policy(y) / |y|

o are the log-odds of a completion's mean token. Within 1e-6 of probability 1 they are continued linearly, so that certainty
has a finite value and a gradient. Rewards logged: o, the quantities that the loss compares.

Source: Hong et al. 2024, "ORPO: Monolithic Preference Optimization without Reference Model", arXiv:2403.07691. The authors'
code takes the NLL as a mean over all tokens of a batch (as does TRL, and as is the default here), by default with those of the
prompt, which this toolkit does not train on; it takes the log of a sigmoid and casts the loss to bfloat16.
Value at policy == reference: depends on the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from ...registry import objective
from ...schema import NonNegative
from ...stats import Completions, Loss, Pairs, reward_metrics

_EDGE = -1e-6
"""The mean log-prob beyond which the log-odds go on linearly; 1 - e^a has still some digits there in float32."""


@dataclass(frozen=True, kw_only=True)
class ORPOConfig:
    """Settings of ORPO."""

    lam: NonNegative = 0.1
    """Weight of the odds ratio (`alpha` in the authors' code, `beta` in TRL)."""

    nll: Literal["tokens", "rows"] = "tokens"
    """What the NLL is a mean over: all chosen tokens of a step, or completions, each by the mean of its own tokens."""


def _log_odds(a: torch.Tensor) -> torch.Tensor:
    """[B] mean log-probs -> [B] a - log(1 - e^a), the second part in the one of two forms that keeps its digits."""
    inside = a.clamp(max=_EDGE)
    log1mexp = torch.where(inside > -math.log(2), (-inside.expm1()).log(), (-inside.exp()).log1p())
    return inside - log1mexp + (a - inside) / -math.expm1(_EDGE)


@objective(reference=False)
def orpo(config: ORPOConfig, pairs: Pairs) -> Loss:
    def mean(one: Completions) -> torch.Tensor:
        return one.mean(one.logps)  # [B]

    chosen, rejected = _log_odds(mean(pairs.chosen)), _log_odds(mean(pairs.rejected))
    losses = config.lam * torch.nn.functional.softplus(rejected - chosen)  # [B]
    nll = -mean(pairs.chosen)
    metrics = {**reward_metrics(chosen, rejected), "nll/chosen": nll.detach()}
    if config.nll == "rows":
        return Loss(losses + nll, metrics)
    return Loss(losses, metrics, plus=Loss(-pairs.chosen.logps.to(losses.dtype), per="chosen"))
