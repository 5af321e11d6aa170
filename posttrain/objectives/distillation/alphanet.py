"""AlphaNet: at each token the larger of two alpha-divergences, one that punishes over-, one that punishes underestimation.

    loss = max(D_min, D_max),   D_a = sum_v q_v (r^a - 1) / (a (a - 1)),   r = p / q,   p teacher, q student

D_1 = KL(p || q), D_0 = KL(q || p); alpha_min = -1 makes the student cover nothing the teacher does not, alpha_max = 1 makes
it cover everything the teacher does. r^a is clipped at `clip`, in the value and, as a constant, in the gradient -sum_v q_v
r^a / a d log q_v, so that a single item cannot dominate; a = 0 and a = 1 have none to clip. The mean is over tokens.

Source: Wang et al. 2021, "AlphaNet: Improved Training of Supernets with Alpha-Divergence", arXiv:2102.07954. The authors'
code returns a surrogate with this gradient instead of the divergence, so the loss it logs is another number; at a = 0 it
clips r itself, before the logarithm. They clip the norm of the whole gradient at 1 (`train.max_grad_norm`).
Value at policy == reference: 0; with a cross-entropy term it depends on the data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...registry import objective
from ...schema import NonNegative, Positive
from ...stats import Loss, Sum, Taught, wide


@dataclass(frozen=True, kw_only=True)
class AlphaNetConfig:
    """Settings of AlphaNet."""

    alpha_min: float = -1.0
    """The smaller exponent."""

    alpha_max: float = 1.0
    """The larger exponent."""

    clip: Positive = 5.0
    """What r^a is clipped at."""

    ce_weight: NonNegative = 0.0
    """Weight of the cross-entropy of the data's tokens."""


def _divergence(name: str, a: float, clip: float) -> Sum:
    if a in (0, 1):
        forward = lambda student, teacher: teacher.exp() * (teacher - student)  # noqa: E731
        reverse = lambda student, teacher: student.exp() * (student - teacher)  # noqa: E731
        return Sum(name=name, summand=forward if a == 1 else reverse)

    def power(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return (a * (teacher - student)).detach().exp().clamp(max=clip)

    def slope(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return -student.exp() * power(student, teacher) / a

    def summand(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        value = student.exp() * (power(student, teacher) - 1) / (a * (a - 1))
        return value.detach() + slope(student, teacher).detach() * (student - student.detach())

    return Sum(name=name, summand=summand, slope=slope)


def _want(config: AlphaNetConfig) -> tuple[Sum, Sum]:
    return _divergence("low", config.alpha_min, config.clip), _divergence("high", config.alpha_max, config.clip)


@objective(reference=True, want=_want, start=lambda config: 0.0 if config.ce_weight == 0 else None)
def alphanet(config: AlphaNetConfig, rows: Taught) -> Loss:
    low, high = wide(rows.completion["low"]), wide(rows.completion["high"])  # [N]
    divergence = torch.where(low > high, low, high)  # [N]
    metrics = {
        "divergence/low": low.detach(),
        "divergence/high": high.detach(),
        "low_share": (low > high).float(),
    }
    return Loss(divergence - config.ce_weight * wide(rows.completion.logps), metrics, per="completion")
