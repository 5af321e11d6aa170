"""BD-KD against the form released by ABKD's authors and numbers worked by hand."""

from __future__ import annotations

import math

import torch
from golden import close, tensor
from golden_taught import taught, taught_golden

from posttrain.objectives.distillation.bdkd import BDKDConfig, bdkd
from posttrain.registry import find

BDKD = find("bdkd")


def test_released_code() -> None:
    """It adds 1e-9 to probabilities in the entropies that it compares, but not in those of the loss."""
    taught_golden("bdkd_w3_abkdrepo").agree(BDKD, BDKDConfig(delta=3, released=True), atol=2e-9)


def test_released_differs_by_the_weighted_entropy_of_the_teacher() -> None:
    file = taught_golden("bdkd_w3_abkdrepo")
    rows = file.taught(BDKD.want(BDKDConfig()))
    plain, released = (bdkd(BDKDConfig(released=released), rows) for released in (False, True))
    entropy, weight = plain.metrics["entropy/teacher"], 1 + 2 * plain.metrics["forward_share"]
    close(released.values - plain.values, (weight * entropy).tolist(), 1e-12)
    first, second = (torch.autograd.grad(loss.values.sum(), file.student, retain_graph=True)[0] for loss in (plain, released))
    assert torch.equal(first, second)


def test_by_hand() -> None:
    """A sure teacher (3/4, 1/4), an unsure student (1/2, 1/2): the reverse KL counts delta times; and the other way round."""
    sure, unsure = [0.75, 0.25], [0.5, 0.5]
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)  # KL(sure || unsure)
    other = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    for student, teacher, expected in ((unsure, sure, kl + 2 * other), (sure, unsure, 2 * other + kl)):
        logits = tensor(student).log()[None].requires_grad_()
        rows = taught(logits, tensor(teacher).log()[None], torch.tensor([0]), BDKD.want(BDKDConfig()))
        close(bdkd(BDKDConfig(delta=2), rows).values, [expected])
