"""ABKD against the authors' code, its continuous limits, and numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from golden import close, tensor
from golden_taught import taught, taught_golden

from posttrain.objectives.distillation.abkd import ABKDConfig, abkd
from posttrain.registry import find

ABKD = find("abkd")


@pytest.mark.parametrize("file", ["abkd_a0.2_b0.7", "abkd_a0_b0.5_theory", "abkd_a1_b0_is_fkl"])
def test_golden(file: str) -> None:
    official = taught_golden(file)
    official.agree(ABKD, ABKDConfig(**official.params))


def one(config: ABKDConfig, student: list[float], teacher: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and its gradient in the log-probs of one token with these probabilities, the token being the first item."""
    logits = tensor(student).log().requires_grad_()
    rows = taught(logits[None], tensor(teacher).log()[None], torch.tensor([0]), ABKD.want(config))
    (loss,) = abkd(config, rows).values
    return loss, torch.autograd.grad(loss, logits)[0]


def test_by_hand() -> None:
    """q = (1/4, 3/4), p = (1/2, 1/2), a = b = 1: half the squared distance, (1/16 + 1/16) / 2; a = b = 1/2: Hellinger."""
    close(one(ABKDConfig(alpha=1, beta=1), [0.25, 0.75], [0.5, 0.5])[0], 1 / 16)
    root = 0.5 * (math.sqrt(0.25) + math.sqrt(0.75)) * math.sqrt(2)
    close(one(ABKDConfig(alpha=0.5, beta=0.5), [0.25, 0.75], [0.5, 0.5])[0], 4 * (1 - root))


SIDES = ([0.1, 0.2, 0.7], [0.5, 0.2, 0.3])


@pytest.mark.parametrize(("a", "b"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.6), (0.4, 0.0), (0.4, -0.4), (-0.7, 0.7), (0.0, 0.0)])
def test_limits_are_continuous(a: float, b: float) -> None:
    """In value and gradient, from a point 1e-5 away, which moves them by as much."""
    for x, y in ((a + 1e-5, b), (a, b + 1e-5)) if a or b else ((1e-5, 2e-5),):
        for at, near in zip(one(ABKDConfig(alpha=a, beta=b), *SIDES), one(ABKDConfig(alpha=x, beta=y), *SIDES), strict=True):
            torch.testing.assert_close(near, at, rtol=0, atol=1e-4)


def test_reverse_kl_and_squared_log_ratios() -> None:
    q, p = (tensor(side) for side in SIDES)
    close(one(ABKDConfig(alpha=0, beta=1), *SIDES)[0], float((q * (q / p).log()).sum()))
    close(one(ABKDConfig(alpha=0, beta=0), *SIDES)[0], float((q / p).log().square().sum() / 2))


@pytest.mark.parametrize(
    ("a", "b", "factor"), [(0.0, 0.5, 0.5), (0.4, 0.0, 0.4), (0.4, -0.4, 0.4), (0.2, 0.7, 1.0), (1.0, 0.0, 1.0)]
)
def test_released_limits(a: float, b: float, factor: float) -> None:
    """The authors' code has 1 / b in place of 1 / b^2, and so on: for a = 0, b = 1/2 the file says it has half."""
    for got, exact in zip(
        one(ABKDConfig(alpha=a, beta=b, limits="released"), *SIDES), one(ABKDConfig(alpha=a, beta=b), *SIDES), strict=True
    ):
        torch.testing.assert_close(got, factor * exact, rtol=0, atol=1e-14)


def test_the_file_shows_the_released_factor() -> None:
    file = taught_golden("abkd_a0_b0.5_theory")
    config = ABKDConfig(alpha=0, beta=0.5, limits="released")
    loss = abkd(config, file.taught(ABKD.want(config))).values.mean()
    close(loss, file.official["loss"], 1e-5)  # which ran in float32


def test_slopes_are_the_derivatives() -> None:
    lp, lq = (torch.randn(2, 9, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    for a, b in [(0.2, 0.7), (0.0, 0.5), (0.5, 0.0), (0.5, -0.5), (0.0, 0.0)]:
        for limits in ("continuous", "released"):
            (entry,) = ABKD.want(ABKDConfig(alpha=a, beta=b, limits=limits))
            leaf = lp.clone().requires_grad_()
            (derivative,) = torch.autograd.grad(entry.summand(leaf, lq).sum(), leaf)
            torch.testing.assert_close(entry.slope(lp, lq), derivative, rtol=0, atol=1e-12)


def test_items_that_neither_model_has() -> None:
    """A log-prob at the kernel's floor of -1e4 adds nothing and has no slope."""
    floor = torch.full((1,), -1e4, dtype=torch.float64)
    for a, b in [(0.2, 0.7), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)]:
        (entry,) = ABKD.want(ABKDConfig(alpha=a, beta=b))
        close(entry.summand(floor, floor), [0.0])
        close(entry.slope(floor, floor), [0.0])
        assert entry.summand(floor, floor / 1e4).isfinite().all()


def test_cross_entropy_beside_it() -> None:
    plain, mixed = one(ABKDConfig(), *SIDES)[0], one(ABKDConfig(ce_weight=0.5), *SIDES)[0]
    close(mixed - plain, -0.5 * math.log(0.1))
    assert ABKD.start(ABKDConfig()) == 0 and ABKD.start(ABKDConfig(ce_weight=0.5)) is None
