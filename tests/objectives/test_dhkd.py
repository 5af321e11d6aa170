"""DHKD's binary KL against the authors' code and numbers worked by hand."""

from __future__ import annotations

import math

import torch
from golden import close, tensor
from golden_taught import taught, taught_golden

from posttrain.objectives.distillation.dhkd import DHKDConfig, binary_kl, dhkd
from posttrain.registry import find

DHKD = find("dhkd")


def test_authors_code_on_raw_logits() -> None:
    """Theirs is 4 times the sum of the binary KLs of the raw logits' difference, halved."""
    file = taught_golden("dhkd_binarykl_norm_T2")
    losses = 4 * binary_kl((file.student - file.teacher) / 2).sum(-1)
    close(losses[file.mask], tensor(file.outputs["per_token"])[file.mask].tolist())
    (gradient,) = torch.autograd.grad(losses[file.mask].mean(), file.student)
    close(gradient, file.outputs["grad_student_logits"])


def test_on_normalised_logits_it_is_the_authors() -> None:
    """Where the log-probs at temperature 2 are the logits, the sum is theirs and the mean is its V-th part."""
    file = taught_golden("dhkd_binarykl_norm_T2")
    student, teacher = (2 * (side[file.mask] / 2).log_softmax(-1) for side in (file.student, file.teacher))
    expected = 4 * binary_kl((student - teacher) / 2).sum(-1)
    targets = torch.zeros(10, dtype=torch.int64)
    for over_items, size in (("sum", 1), ("mean", 23)):
        config = DHKDConfig(over_items=over_items, ce_weight=0)
        close(dhkd(config, taught(student, teacher, targets, DHKD.want(config))).values, (expected / size).tolist())


def test_by_hand() -> None:
    """sigmoid(log 3) = 3/4: KL of (1/2, 1/2) from (3/4, 1/4) is log(4/3) / 2, on either side; far out it is |x| / 2 - log 2."""
    close(binary_kl(tensor([math.log(3), -math.log(3), 0.0])), [math.log(4 / 3) / 2] * 2 + [0.0])
    close(binary_kl(tensor([1e4, -1e4])), [5e3 - math.log(2)] * 2)


def test_the_sum_of_both_terms() -> None:
    """q = (1/4, 3/4), p = (1/2, 1/2), T = 1: x = -log 2 and log 3/2, and cosh(x / 2)^2 = 9/8 and 25/24."""
    config = DHKDConfig(temperature=1, over_items="sum", weight=2, ce_weight=1)
    rows = taught(tensor([[0.25, 0.75]]).log(), tensor([[0.5, 0.5]]).log(), torch.tensor([0]), DHKD.want(config))
    close(dhkd(config, rows).values, [math.log(9 / 8) + math.log(25 / 24) + math.log(4)])
