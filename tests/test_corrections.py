"""The position that SCRG corrects, against an independent implementation and by hand."""

from __future__ import annotations

import torch
from golden import close, tensor
from golden_taught import taught_golden

from posttrain.corrections import corrected, worst_disagreement


def test_golden() -> None:
    file = taught_golden("mgsr_span_and_scrg")
    student, teacher = (torch.tensor(file.inputs[f"{side}_tokens"]) for side in ("student", "teacher"))
    lp, lq = file.teacher.log_softmax(-1), file.student.detach().log_softmax(-1)
    kl = (lp.exp() * (lp - lq)).sum(-1)
    close(kl, file.outputs["kl_per_position"])
    assert worst_disagreement(student, teacher, kl, file.mask).tolist() == file.outputs["scrg_position"]


def test_by_hand() -> None:
    """The largest KL is where both agree, the next one is padding, the third is it; the second row agrees throughout."""
    student, teacher = torch.tensor([[5, 6, 7, 8]] * 2), torch.tensor([[5, 1, 1, 1], [5, 6, 7, 8]])
    kl = tensor([[9.0, 1.0, 2.0, 8.0]] * 2)
    mask = torch.tensor([[1, 1, 1, 0]] * 2)
    assert worst_disagreement(student, teacher, kl, mask).tolist() == [2, -1]
    assert corrected([5, 6, 7, 8], [5, 1, 1, 1], 2) == [5, 6, 1]
    assert corrected([5, 6, 7, 8], [5, 6, 7, 8], -1) == [5, 6, 7, 8]
