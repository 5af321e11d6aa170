"""NKD against the authors' code and numbers worked by hand."""

from __future__ import annotations

import math

import torch
from golden import close, tensor
from golden_taught import taught, taught_golden

from posttrain.objectives.distillation.nkd import NKDConfig, nkd
from posttrain.registry import find

NKD = find("nkd")


def test_authors_code() -> None:
    taught_golden("nkd_gamma1.5_T1").agree(NKD, NKDConfig(ce_weight=0))


def values(config: NKDConfig, student: list[float], teacher: list[float]) -> torch.Tensor:
    logits = tensor(student).log()[None].requires_grad_()
    return nkd(config, taught(logits, tensor(teacher).log()[None], torch.tensor([0]), NKD.want(config))).values


def test_by_hand() -> None:
    """q = (1/2, 1/4, 1/4), p = (1/4, 1/2, 1/4): 1/4 log 2 for the token; of the others q is (1/2, 1/2), so log 2."""
    close(values(NKDConfig(ce_weight=0), [0.5, 0.25, 0.25], [0.25, 0.5, 0.25]), [0.25 * math.log(2) + 1.5 * math.log(2)])
    close(values(NKDConfig(), [0.5, 0.25, 0.25], [0.25, 0.5, 0.25]), [2.75 * math.log(2)])


def test_temperature_reaches_the_others_only() -> None:
    """At T = 2 probabilities (4/5, 1/5) of the others become (2/3, 1/3), and T^2 = 4."""
    got = values(NKDConfig(ce_weight=0, gamma=1, temperature=2), [0.5, 0.25, 0.25], [0.5, 0.4, 0.1])
    close(got, [0.5 * math.log(2) + 4 * math.log(2)])
    got = values(NKDConfig(ce_weight=0, gamma=1, temperature=2), [0.5, 0.4, 0.1], [0.5, 0.25, 0.25])
    close(got, [0.5 * math.log(2) - 4 * 0.5 * (math.log(2 / 3) + math.log(1 / 3))])


def test_a_sure_student_leaves_finite_others() -> None:
    """1 - q_y is 0 in floating point, but the distribution over the others is not lost."""
    logits = torch.tensor([[900.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    rows = taught(logits, torch.zeros(1, 3, dtype=torch.float64), torch.tensor([0]), NKD.want(NKDConfig()))
    loss = nkd(NKDConfig(gamma=1, ce_weight=0), rows).values
    close(loss, [math.log1p(math.e) - 0.5])
    assert torch.autograd.grad(loss.sum(), logits)[0].isfinite().all()
