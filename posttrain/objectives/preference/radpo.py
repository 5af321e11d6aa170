"""Risk-aware DPO: TDPO with a measure of risk in place of the KL of each token.

    loss = -log sigmoid(r_chosen - r_rejected)
    version 1:  r = beta * (h + R)
    version 2:  r = beta * (h + alpha * R), without gradient through R of the chosen completion
    h = sum_t log policy(y_t) - log reference(y_t),   R = sum_t risk(Z_t)
    Z_t(v) = log reference(v) - log policy(v), v drawn from the reference after y_<t

The mean of Z_t is the KL of TDPO; the measures, in risk.py, look at its tail. `risk: kl` is TDPO. Rewards logged: r as it
stands in the loss (the authors log beta * (h + R) for both versions).

What the paper says, what it writes and what its authors' code does are three measures:
    text      "slightly larger than the KL" and convex: the mean of the worst share of Z, which is `cvar_upper`
    eq. 21    (1/mu) * integral_0^mu of the quantile function, the mean of the smallest share of Z: `cvar_lower`, below the KL
    code      `official`: a quantile of Z with every item of the vocabulary counted once, not with its probability; the sum of
              reference * Z above it, not divided by the mass of what is kept; the vocabulary first cut in two halves (`split`,
              on by default), where the comment speaks of chosen and rejected
The default is the one that is averse to risk, as the paper means it. The entropic measure is not in the code. The authors write
it (1/mu) * log E e^(-mu Z), which is -erm_lower: below 0 for mu < 1, and (mu - 1)/mu times a Renyi divergence from policy to
reference at the 5 to 9 that they take.

Source: Zhang et al. 2025, "Risk-aware Direct Preference Optimization under Nested Risk Measure", arXiv:2505.20359, eq. 14 to
21, and the authors' code, whose defaults are version 1, official, split, at a level of 0.95.
Value at policy == reference: log 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ... import risk
from ...registry import objective
from ...schema import NonNegative, Positive
from ...stats import Loss, Pairs, Rowwise, Want, reward_metrics


@dataclass(frozen=True, kw_only=True)
class RaDPOConfig:
    """Settings of Ra-DPO."""

    beta: Positive = 0.1
    """Pull to the reference; larger keeps the policy nearer."""

    version: Literal[1, 2] = 2
    """Ra-DPO1 (gradient through both risks, weight 1) or Ra-DPO2 (not through that of the chosen completion, weight alpha)."""

    alpha: NonNegative = 0.5
    """Weight of the risks in version 2; version 1 has none."""

    risk: Literal["kl", "cvar_upper", "cvar_lower", "erm_upper", "erm_lower", "official"] = "cvar_upper"
    """Measure of risk; `official` is that of the authors' code."""

    mu: Positive = 0.97
    """Level of the risk. cvar: the share looked at, 1 is the KL; the authors take 0.95 to 0.99. erm: towards 0 the KL, and
    erm_lower falls to 0 at 1. official: its confidence level, below 1; the authors take 0.95."""

    split: bool = True
    """official: the two halves of the vocabulary apart, as the authors' code does by default."""

    def __post_init__(self) -> None:
        if self.risk.startswith("cvar") and self.mu > 1:
            raise ValueError(f"mu = {self.mu:g}: the share of {self.risk} is at most 1")
        if self.risk == "official" and self.mu >= 1:
            raise ValueError(f"mu = {self.mu:g}: the confidence level of official is below 1")


_LEVELLED = {
    "cvar_upper": risk.cvar_upper,
    "cvar_lower": risk.cvar_lower,
    "erm_upper": risk.erm_upper,
    "erm_lower": risk.erm_lower,
}


def _want(config: RaDPOConfig) -> Sequence[Want]:
    if config.risk == "kl":
        return ("forward_kl",)

    def measure(lp: torch.Tensor, lq: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        if config.risk == "official":
            return risk.official(lp, lq, config.mu, config.split)
        return _LEVELLED[config.risk](lp, lq, config.mu)

    return (Rowwise(name="risk", f=measure),)


@objective(reference=True, want=_want, start=math.log(2))
def radpo(config: RaDPOConfig, pairs: Pairs) -> Loss:
    name = "forward_kl" if config.risk == "kl" else "risk"
    risk_chosen, risk_rejected = (one.sum(one[name]) for one in (pairs.chosen, pairs.rejected))  # [B]
    held, weight = (risk_chosen.detach(), config.alpha) if config.version == 2 else (risk_chosen, 1.0)
    chosen = config.beta * (pairs.chosen.logratio + weight * held)  # [B]
    rejected = config.beta * (pairs.rejected.logratio + weight * risk_rejected)  # [B]
    metrics = {"risk/chosen": risk_chosen.detach(), "risk/rejected": risk_rejected.detach()}
    return Loss(torch.nn.functional.softplus(rejected - chosen), {**reward_metrics(chosen, rejected), **metrics})
