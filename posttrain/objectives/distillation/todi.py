"""ToDi: forward and reverse KL mixed item by item, the forward one where the teacher is above the student.

    loss = sum_v s_v p_v (log p_v - log q_v) + (1 - s_v) q_v (log q_v - log p_v),   s = p / (p + q),   p teacher, q student

s has no gradient. The forward term pulls up what the student finds too unlikely, the reverse one pushes down what it finds
too likely; s says which of the two an item needs. The mean is over tokens.

Source: Jung et al. 2025, "ToDi: Token-wise Distillation via Fine-Grained Divergence Control", arXiv:2505.16297. The authors'
code sums over the tokens and divides by a count of its batch; value and gradient of a token are the same.
Value at policy == reference: 0; with a cross-entropy term it depends on the data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...registry import objective
from ...schema import NonNegative
from ...stats import Loss, Sum, Taught, wide


@dataclass(frozen=True, kw_only=True)
class ToDiConfig:
    """Settings of ToDi."""

    ce_weight: NonNegative = 0.0
    """Weight of the cross-entropy of the data's tokens."""


def _share(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(teacher - student).detach()


def _summand(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    share = _share(student, teacher)
    return (share * teacher.exp() - (1 - share) * student.exp()) * (teacher - student)


def _slope(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    share = _share(student, teacher)
    return (1 - share) * student.exp() * (student - teacher + 1) - share * teacher.exp()


_TODI = Sum(name="todi", summand=_summand, slope=_slope, eager=True)


@objective(reference=True, want=(_TODI,), start=lambda config: 0.0 if config.ce_weight == 0 else None)
def todi(config: ToDiConfig, rows: Taught) -> Loss:
    divergence = wide(rows.completion["todi"])  # [N]
    return Loss(divergence - config.ce_weight * wide(rows.completion.logps), {"todi": divergence.detach()}, per="completion")
