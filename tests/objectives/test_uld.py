"""ULD against its formula and numbers worked by hand."""

from __future__ import annotations

import math

import torch
from golden import close, tensor
from golden_taught import taught, taught_golden

from posttrain.objectives.distillation.uld import ULDConfig, uld
from posttrain.registry import find
from posttrain.stats import Completions, Taught

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


def test_ranks_beyond_k_are_left_out_and_logged() -> None:
    """q = (1/2, 1/4, 1/4), p = (3/4, 1/8, 1/8): 1/4 + 1/8 of the first two ranks, 1/4 and 1/8 are beyond them."""
    config = ULDConfig(k=2, weight=1)
    rows = taught(tensor([[0.25, 0.5, 0.25]]).log(), tensor([[0.125, 0.125, 0.75]]).log(), torch.tensor([0]), ULD.want(config))
    loss = uld(config, rows)
    close(loss.values, [3 / 8])
    close(loss.metrics["beyond/student"], [1 / 4])
    close(loss.metrics["beyond/teacher"], [1 / 8])


def test_a_teacher_of_other_tokens() -> None:
    """A smaller vocabulary is 0 beyond its end, and a token without counterpart counts neither in the sum nor in the number."""
    one = Completions(
        logps=tensor([0.25, 0.5, 0.5]).log().requires_grad_(),
        lengths=torch.tensor([1, 2]),
        more={
            "ranked_logps": tensor([[0.5, 0.25, 0.25]] * 3).log(),
            "ranked_reference_logps": tensor([[0.5, 0.5], [0.75, 0.25], [1.0, 1e-300]]).log(),
            "paired": torch.tensor([1.0, 1.0, 0.0]),
        },
    )
    loss = uld(ULDConfig(weight=2), Taught(completion=one))
    close(loss.values, [2 * 0.5, 2 * 0.5])
    close(loss.metrics["sorted_l1"], [0.5, 0.5])
    close(loss.plus.values, [math.log(4), math.log(2), math.log(2)])
