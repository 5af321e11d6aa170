"""PLD against its formula and numbers worked by hand."""

from __future__ import annotations

import math

import torch
from golden import close, tensor
from golden_taught import taught, taught_golden

from posttrain.objectives.distillation.pld import PLDConfig, pld
from posttrain.registry import find

PLD = find("pld")


def test_formula() -> None:
    taught_golden("pld").agree(PLD, PLDConfig())


def values(config: PLDConfig, student: list[float], teacher: list[float], token: int) -> torch.Tensor:
    return pld(
        config, taught(tensor(student).log()[None], tensor(teacher).log()[None], torch.tensor([token]), PLD.want(config))
    ).values


def test_by_hand() -> None:
    """The token is the second item, then the teacher prefers the third to the first: 1/4 log 2, 1/2 log 2, and nothing."""
    student, teacher = [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]
    close(values(PLDConfig(), student, teacher, 1), [0.75 * math.log(2)])
    close(values(PLDConfig(ce_weight=1), student, teacher, 1), [1.75 * math.log(2)])


def test_a_sure_teacher_makes_it_a_cross_entropy() -> None:
    close(values(PLDConfig(), [0.2, 0.3, 0.5], [1.0, 1e-300, 1e-300], 0), [-math.log(0.2)])


def test_an_offset_of_the_logits_changes_nothing() -> None:
    file = taught_golden("pld")
    rows = [taught(file.student[0] + c, file.teacher[0], torch.arange(5), PLD.want(PLDConfig())) for c in (0, 7.5)]
    close(pld(PLDConfig(), rows[0]).values, pld(PLDConfig(), rows[1]).values.tolist(), 1e-12)
