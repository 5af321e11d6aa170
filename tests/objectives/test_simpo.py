"""SimPO against numbers worked by hand and at the ends of the range."""

from __future__ import annotations

import math

import pytest
import torch
from golden import close
from hand import at_the_ends, completions, pairs, slopes

from posttrain.objectives.preference.simpo import SimPOConfig, simpo
from posttrain.registry import find
from posttrain.schema import UserError, parse
from posttrain.stats import Pairs


def test_by_hand() -> None:
    """beta 2, gamma 0.5. Chosen -1, -2, -3: mean -2, reward -4. Rejected -1, -2: mean -1.5, reward -3.

    m = -4 + 3 - 0.5 = -1.5; loss log(1 + e^1.5) = 1.701413. Each chosen token: -2 / 3 * sigmoid(1.5), each rejected one 2 / 2.
    """
    batch = Pairs(chosen=completions([[-1.0, -2.0, -3.0]]), rejected=completions([[-1.0, -2.0]]))
    loss = simpo(SimPOConfig(), batch)
    close(loss.values, [math.log1p(math.exp(1.5))])
    close(loss.metrics["rewards/chosen"], [-4.0])
    close(loss.metrics["rewards/rejected"], [-3.0])
    weight = 1 / (1 + math.exp(-1.5))
    chosen, rejected = slopes(loss, batch)
    close(chosen, [-2 / 3 * weight] * 3)
    close(rejected, [weight] * 2)


def test_authors_form_of_the_margin() -> None:
    """-log sigmoid(beta * (difference - gamma_beta_ratio)), gamma_beta_ratio 0.25 at beta 2."""
    batch = pairs([-1.0, -2.5], [-1.2, -0.5])
    difference = (batch.chosen.logps - batch.rejected.logps).detach()
    close(simpo(SimPOConfig(), batch).values, torch.nn.functional.softplus(-2.0 * (difference - 0.25)).tolist(), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ends(dtype: torch.dtype) -> None:
    chosen, rejected, gradients = at_the_ends(find("simpo"), SimPOConfig(), (0.0, -1.0, -30.0, -1000.0), dtype)
    out_of_order = chosen <= rejected
    assert (gradients[0][out_of_order] < 0).all() and (gradients[1][out_of_order] > 0).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beta": 0}, "simpo: beta = 0: Input should be greater than 0"),
        ({"gamma": -1}, "simpo: gamma = -1: Input should be greater than or equal to 0"),
        ({"gamma_beta_ratio": 0.5}, "simpo: unknown key 'gamma_beta_ratio'. Possible: beta, gamma"),
    ],
)
def test_refused_settings(values: dict[str, float], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(SimPOConfig, values, "simpo")
    assert str(error.value) == message
