"""ABKD: the alpha-beta divergence, which weighs how wrong the student is and how sure it is apart from each other.

    loss = -1 / (a b) sum_v [p^a q^b - a / (a + b) p^(a + b) - b / (a + b) q^(a + b)],   p teacher, q student

a = alpha, b = beta, and where one of the three denominators is 0 its limit:

    b = 0        1 / a^2 sum_v [a p^a (log p - log q) - p^a + q^a]      (a = 1: KL(p || q))
    a = 0        1 / b^2 sum_v [b q^b (log q - log p) - q^b + p^b]      (b = 1: KL(q || p))
    a = -b       1 / a^2 sum_v [a (log q - log p) + (p / q)^a - 1]
    a = b = 0    1 / 2 sum_v (log p - log q)^2

The mean is over tokens. The gradient in log q is q^(a + b) times -((p / q)^a - 1) / a in every case.

Source: Wang et al. 2025, "ABKD: Pursuing a Proper Allocation of the Probability Mass in Knowledge Distillation via
alpha-beta-Divergence", arXiv:2505.04560; limits: Cichocki et al. 2011, "Generalized Alpha-Beta Divergences". The authors'
code has 1 / b, 1 / a, 1 / a in place of the three squares, so that its loss jumps by that factor at the limit: `limits:
released`. Its script for GPT-2 runs a = 0, b = 1, which is the reverse KL, whatever it is told.
Value at policy == reference: 0; with a cross-entropy term it depends on the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ...registry import objective
from ...schema import NonNegative
from ...stats import Loss, Sum, Taught, wide


@dataclass(frozen=True, kw_only=True)
class ABKDConfig:
    """Settings of ABKD."""

    alpha: float = 0.2
    """a, how much items that the teacher finds likely and the student does not (and the reverse) stand out; the paper's value
    for instruction data, 1 for the forward KL."""

    beta: float = 0.7
    """b, how much items that the student finds likely stand out; the paper's value for instruction data, 1 for the reverse
    KL. Negative exponents are allowed, but then the least likely items dominate."""

    limits: Literal["continuous", "released"] = "continuous"
    """The limits where alpha, beta or their sum is 0: those of the divergence, or those of the authors' code."""

    ce_weight: NonNegative = 0.0
    """Weight of the cross-entropy of the data's tokens."""


def _divergence(a: float, b: float, scale: float) -> Sum:
    def summand(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        ratio = student - teacher
        if a == b == 0:
            return 0.5 * ratio.square()
        if b == 0:
            return scale * (-a * (a * teacher).exp() * ratio - (a * teacher).exp() + (a * student).exp()) / a**2
        if a == 0:
            return scale * (b * (b * student).exp() * ratio - (b * student).exp() + (b * teacher).exp()) / b**2
        if a + b == 0:
            return scale * (a * ratio + (-a * ratio).exp() - 1) / a**2
        powers = a / (a + b) * ((a + b) * teacher).exp() + b / (a + b) * ((a + b) * student).exp()
        return (powers - (a * teacher + b * student).exp()) / (a * b)

    def slope(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        if a == 0:
            return scale * (b * student).exp() * (student - teacher)
        return scale * (((a + b) * student).exp() - (a * teacher + b * student).exp()) / a

    return Sum(name="alpha_beta", summand=summand, slope=slope, eager=True)


def _want(config: ABKDConfig) -> tuple[Sum]:
    a, b, scale = config.alpha, config.beta, 1.0
    if config.limits == "released" and (a == 0) != (b == 0):
        scale = a + b  # the one that is not 0
    elif config.limits == "released" and a == -b != 0:
        scale = a
    return (_divergence(a, b, scale),)


@objective(reference=True, want=_want, start=lambda config: 0.0 if config.ce_weight == 0 else None)
def abkd(config: ABKDConfig, rows: Taught) -> Loss:
    divergence = wide(rows.completion["alpha_beta"])  # [N]
    losses = divergence - config.ce_weight * wide(rows.completion.logps)
    return Loss(losses, {"alpha_beta": divergence.detach()}, per="completion")
