"""ULD against its formula and numbers worked by hand."""

from __future__ import annotations

import math

import torch
from golden import close, tensor
from golden_taught import taught, taught_golden

from posttrain.objectives.distillation.uld import ULDConfig, uld
from posttrain.registry import find

ULD = find("uld")


def test_formula() -> None:
    file = taught_golden("uld_same_length")
    loss = uld(ULDConfig(weight=1), file.taught(ULD.want(ULDConfig())))
    assert loss.per == "row"
    close(loss.values.mean(), file.outputs["loss"])
    (gradient,) = torch.autograd.grad(loss.values.mean(), file.student)
    close(gradient, file.outputs["grad_student_logits"])


def test_by_hand() -> None:
    """Sorted, (1/4, 3/4) and (1/2, 1/2) are 1/2 apart, whichever item is the likelier. Weighted 3/2, beside the CE."""
    for student in ([0.25, 0.75], [0.75, 0.25]):
        rows = taught(tensor([student]).log(), tensor([[0.5, 0.5]]).log(), torch.tensor([0]), ULD.want(ULDConfig()))
        loss = uld(ULDConfig(), rows)
        close(loss.values, [0.75])
        assert loss.plus.per == "completion"
        close(loss.plus.values, [-math.log(student[0])])


def test_rows_count_alike_whatever_their_length() -> None:
    """Distances 1/2 at one token of a short row, 0 and 1/2 at the two of a longer one."""
    student = tensor([[0.25, 0.75], [0.5, 0.5], [0.25, 0.75]]).log()
    rows = taught(student, tensor([[0.5, 0.5]] * 3).log(), torch.tensor([0, 0, 0]), ULD.want(ULDConfig()), [1, 2])
    close(uld(ULDConfig(weight=1), rows).values, [0.5, 0.25])
