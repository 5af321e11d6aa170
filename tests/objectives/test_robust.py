"""Robust DPO against TRL, DPO and numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from golden import close, golden
from hand import at_the_ends, pairs

from posttrain.objectives.preference.dpo import DPOConfig, dpo
from posttrain.objectives.preference.robust import RobustConfig, robust
from posttrain.registry import find
from posttrain.schema import UserError, parse


def test_released_code() -> None:
    official = golden("baseline_trl_robust")
    config = RobustConfig(beta=official.inputs["beta"], label_smoothing=official.inputs["label_smoothing"])
    official.agree(find("robust"), config)


def test_by_hand() -> None:
    """beta 0.5, eps 0.1, margin 0.5 * 4 = 2: (0.9 log(1 + e^-2) - 0.1 log(1 + e^2)) / 0.8 = -0.123072."""
    expected = (0.9 * math.log1p(math.exp(-2)) - 0.1 * math.log1p(math.exp(2))) / 0.8
    close(robust(RobustConfig(beta=0.5), pairs([3.0], [-1.0])).values, [expected])
    assert expected == pytest.approx(-0.123072, abs=1e-6)


def test_without_flips_it_is_dpo() -> None:
    batch = pairs([1.0, -2.0], [0.5, 3.0])
    close(robust(RobustConfig(label_smoothing=0), batch).values, dpo(DPOConfig(), batch).values.tolist(), 1e-12)


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.3])
def test_unbiased(eps: float) -> None:
    """With a share eps of the pairs flipped, its mean is DPO's on clean pairs: (1 - eps) l(m) + eps l(-m) = L(m)."""
    kept, flipped = pairs([1.0, -20.0], [3.0, 5.0]), pairs([3.0, 5.0], [1.0, -20.0])
    config = RobustConfig(label_smoothing=eps)
    mean = (1 - eps) * robust(config, kept).values + eps * robust(config, flipped).values
    close(mean, dpo(DPOConfig(), kept).values.tolist(), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ends(dtype: torch.dtype) -> None:
    """The gradient never dies: the slope is at least eps / (1 - 2 eps) * beta."""
    _, _, (chosen, rejected) = at_the_ends(find("robust"), RobustConfig(), dtype=dtype)
    assert (chosen < -0.0124).all() and (rejected > 0.0124).all()


@pytest.mark.parametrize("eps", [0.5, -0.1])
def test_share_of_flips_is_below_a_half(eps: float) -> None:
    with pytest.raises(UserError, match=rf"^robust: label_smoothing = {eps}: Input should be (less|greater) than .*$"):
        parse(RobustConfig, {"label_smoothing": eps}, "robust")
