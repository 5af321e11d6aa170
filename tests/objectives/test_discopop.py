"""DiscoPOP against TRL, numbers worked by hand, its stationary points, and the ends of the range."""

from __future__ import annotations

import math

import pytest
import torch
from golden import close, golden
from hand import at_the_ends, pairs, slopes

from posttrain.objectives.preference.discopop import DiscoPOPConfig, discopop
from posttrain.registry import find
from posttrain.schema import UserError, parse


def test_released_code() -> None:
    official = golden("baseline_trl_discopop")
    official.agree(find("discopop"), DiscoPOPConfig(beta=official.inputs["beta"]))


def test_by_hand() -> None:
    """beta 1, tau 1/2, margin log 2: w = sigmoid(log 4) = 4/5; loss 1/5 log(3/2) + 4/5 * 1/2."""
    loss = discopop(DiscoPOPConfig(beta=1, tau=0.5), pairs([math.log(2)], [0.0]))
    close(loss.values, [0.2 * math.log(1.5) + 0.4])


@pytest.mark.parametrize(("margin", "value", "kind"), [(-0.118570, 0.785924, 1), (0.072006, 0.878290, -1)])
def test_stationary_points(margin: float, value: float, kind: int) -> None:
    """The local minimum (1) and the local maximum (-1) at tau 0.05."""
    batch = pairs([margin, margin - 1e-3, margin + 1e-3], [0.0] * 3)
    loss = discopop(DiscoPOPConfig(beta=1), batch)
    assert loss.values[0].item() == pytest.approx(value, abs=1e-6)
    at, before, after = slopes(loss, batch)[0].tolist()
    assert abs(at) < 2e-4 and before * kind < 0 < after * kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ends(dtype: torch.dtype) -> None:
    """No 0 * infinity; a pair far out of order has the slope of DPO."""
    chosen, rejected, gradients = at_the_ends(find("discopop"), DiscoPOPConfig(), dtype=dtype)
    far = chosen < rejected - 500
    close(gradients[0][far], [-0.05] * int(far.sum()), 1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tau": 0}, "discopop: tau = 0: Input should be greater than 0"),
        ({"tau": 1}, "discopop: tau = 1: Input should be less than 1"),
    ],
)
def test_refused_settings(values: dict[str, float], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(DiscoPOPConfig, values, "discopop")
    assert str(error.value) == message
