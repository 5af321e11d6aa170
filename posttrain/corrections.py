"""Rollouts corrected by a teacher: where a student's own text goes wrong, the teacher's token takes over.

Sequence correction and re-generation (SCRG): of a student's completion y, at whose every position the teacher has drawn a
token y' after the student's own tokens, one token is corrected, the student writes on from there, and that text is learned
from:

    j = argmax over positions i with y'_i != y_i of KL(p_i || q_i),   y <- y_1 ... y_(j-1) y'_j, then re-generated

Where the two agree at every position the completion stays as it is.

Source: Liu et al. 2024, "Multi-Granularity Semantic Revision for Large Language Model Distillation", arXiv:2407.10068, eq. 3
to 5, as reviews quote them: there is no code of the authors, and they do not say what happens where no position disagrees.
"""

from __future__ import annotations

import torch
from torch import Tensor


def worst_disagreement(student: Tensor, teacher: Tensor, kl: Tensor, mask: Tensor) -> Tensor:
    """[B] int64 the position to correct in each completion, -1 where the models agree on every token.

    Args:
        student: [B, T] tokens of the completions.
        teacher: [B, T] what the teacher would have written at each position after the student's tokens before it.
        kl: [B, T] KL(teacher || student) at each position.
        mask: [B, T] which positions are tokens of the completion.
    """
    candidates = (student != teacher) & mask.bool()
    worst = kl.masked_fill(~candidates, -torch.inf).argmax(-1)
    return torch.where(candidates.any(-1), worst, -1)


def corrected(completion: list[int], teacher: list[int], position: int) -> list[int]:
    """What the student writes on from: the completion up to `position`, where the teacher's token stands; all of it for -1."""
    return list(completion) if position < 0 else [*completion[:position], teacher[position]]
