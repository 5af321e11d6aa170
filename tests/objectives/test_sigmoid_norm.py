"""Length-normalised DPO against TRL and numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from golden import close, golden
from hand import at_the_ends, completions, slopes

from posttrain.objectives.preference.sigmoid_norm import SigmoidNormConfig, sigmoid_norm
from posttrain.registry import find
from posttrain.schema import UserError, parse
from posttrain.stats import Pairs


def test_released_code() -> None:
    official = golden("baseline_trl_sigmoid_norm")
    official.agree(find("sigmoid_norm"), SigmoidNormConfig(beta=official.inputs["beta"]))


def test_by_hand() -> None:
    """beta 2. Log-ratios 1, 3 (mean 2) and 3, 0, 0 (mean 1): rewards 4 and 2, m = 2; slopes 2 / 2 and 2 / 3 of sigmoid(-2)."""
    batch = Pairs(chosen=completions([[1.0, 3.0]]), rejected=completions([[3.0, 0.0, 0.0]]))
    loss = sigmoid_norm(SigmoidNormConfig(beta=2), batch)
    close(loss.values, [math.log1p(math.exp(-2))])
    close(loss.metrics["rewards/chosen"], [4.0])
    close(loss.metrics["rewards/rejected"], [2.0])
    weight = 1 / (1 + math.exp(2))
    chosen, rejected = slopes(loss, batch)
    close(chosen, [-weight] * 2)
    close(rejected, [2 / 3 * weight] * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ends(dtype: torch.dtype) -> None:
    chosen, rejected, gradients = at_the_ends(find("sigmoid_norm"), SigmoidNormConfig(), dtype=dtype)
    out_of_order = chosen <= rejected
    assert (gradients[0][out_of_order] < 0).all() and (gradients[1][out_of_order] > 0).all()


def test_beta_must_be_positive() -> None:
    with pytest.raises(UserError, match=r"^sigmoid_norm: beta = 0: Input should be greater than 0$"):
        parse(SigmoidNormConfig, {"beta": 0}, "sigmoid_norm")
