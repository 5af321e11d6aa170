"""DKD against released code, its identity with the KL, and numbers worked by hand."""

from __future__ import annotations

import math

import torch
from golden import close, tensor
from golden_taught import taught, taught_golden

from posttrain.objectives.distillation.dkd import DKDConfig, dkd
from posttrain.registry import find

DKD = find("dkd")


def test_released_code() -> None:
    """The golden's loss is that of the port in TAID's code, times the share of positions that count."""
    taught_golden("dkd_a1_b0.5").agree(DKD, DKDConfig(alpha=1, beta=0.5))


def test_the_two_parts_make_up_the_kl() -> None:
    """KL(p || q) = KL(b || b') + (1 - p_y) KL(p' || q'), the identity the method starts from."""
    file = taught_golden("dkd_a1_b0.5")
    rows = file.taught([*DKD.want(DKDConfig()), "forward_kl"])
    metrics = dkd(DKDConfig(), rows).metrics
    whole = metrics["target_kl"] + (1 - rows.completion.reference_logps.exp()) * metrics["others_kl"]
    close(whole, rows.completion["forward_kl"].tolist(), 1e-12)


def values(config: DKDConfig, student: list[float], teacher: list[float]) -> torch.Tensor:
    logits = tensor(student).log()[None].requires_grad_()
    return dkd(config, taught(logits, tensor(teacher).log()[None], torch.tensor([0]), DKD.want(config))).values


def test_by_hand() -> None:
    """q = (1/2, 1/4, 1/4), p = (1/4, 1/2, 1/4): KL of (1/4, 3/4) from (1/2, 1/2), and of (2/3, 1/3) from (1/2, 1/2)."""
    token = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    others = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    close(values(DKDConfig(alpha=2, beta=3), [0.5, 0.25, 0.25], [0.25, 0.5, 0.25]), [2 * token + 3 * others])


def test_temperature() -> None:
    """Squaring undoes T = 2; the factor is 4, or 1 where it is not wanted."""
    square = lambda side: [x**2 / sum(y**2 for y in side) for x in side]  # noqa: E731
    q, p = [0.5, 0.25, 0.25], [0.25, 0.5, 0.25]
    expected = values(DKDConfig(), q, p)
    close(values(DKDConfig(temperature=2), square(q), square(p)), (4 * expected).tolist())
    close(values(DKDConfig(temperature=2, temperature_squared=False), square(q), square(p)), expected.tolist())


def test_a_sure_student_and_a_sure_teacher() -> None:
    """1 - p_y is 0 in floating point on one side; on both there is still a KL over the others."""
    sure = torch.tensor([[900.0, 1.0, 0.0]], dtype=torch.float64)
    for student, teacher in ((sure, torch.zeros_like(sure)), (torch.zeros_like(sure), sure), (sure, sure)):
        leaf = student.clone().requires_grad_()
        loss = dkd(DKDConfig(), taught(leaf, teacher, torch.tensor([0]), DKD.want(DKDConfig()))).values
        assert loss.isfinite().all() and torch.autograd.grad(loss.sum(), leaf)[0].isfinite().all()
