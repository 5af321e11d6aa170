"""PLD: the student ranks the items as the teacher does, the token of the data first, under a Plackett-Luce model.

    loss = -sum_k p_k [z_k - log sum_{j >= k} exp z_j],   z student's logits

k runs over the items in order: the token of the data, then by falling probability under the teacher; p_k is the teacher's
probability of the k-th. Each term is the log-probability that the student picks the k-th item among those not yet picked, so
the first is a cross-entropy weighted by the teacher: it replaces CE. The mean is over tokens.

Source: Bassam et al. 2025, "PLD: A Choice-Theoretic List-Wise Knowledge Distillation", arXiv:2506.12542; the port in PyLate
agrees. The whole vocabulary is sorted, per token of a block at a time.
Value at policy == reference: depends on the data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...registry import objective
from ...schema import NonNegative, Positive
from ...stats import Loss, Rowwise, Taught, wide


@dataclass(frozen=True, kw_only=True)
class PLDConfig:
    """Settings of PLD."""

    temperature: Positive = 1.0
    """Divides the logits of both models."""

    ce_weight: NonNegative = 0.0
    """Weight of a cross-entropy of the data's tokens beside it."""


def _ranking(student: torch.Tensor, teacher: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        # from last to first, as a cumulative sum runs
        order = teacher.scatter(1, tokens[:, None], torch.inf).argsort(-1)  # [n, V]
        weight = teacher.gather(1, order).exp()  # [n, V]
    picked = student.gather(1, order)  # [n, V]
    return (weight * (picked.logcumsumexp(-1) - picked)).sum(-1)


@objective(
    reference=True, want=lambda config: (Rowwise(name="ranking", f=_ranking, temperature=config.temperature, eager=True),)
)
def pld(config: PLDConfig, rows: Taught) -> Loss:
    ranking = wide(rows.completion["ranking"])  # [N]
    return Loss(ranking - config.ce_weight * wide(rows.completion.logps), {"ranking": ranking.detach()}, per="completion")
