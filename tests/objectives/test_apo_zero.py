"""APO-zero against TRL and numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from golden import close, golden
from hand import at_the_ends, pairs, slopes

from posttrain.objectives.preference.apo_zero import APOZeroConfig, apo_zero
from posttrain.registry import find
from posttrain.schema import UserError, parse


def test_released_code() -> None:
    official = golden("baseline_trl_apo_zero")
    official.agree(find("apo_zero"), APOZeroConfig(beta=official.inputs["beta"]))


def test_by_hand() -> None:
    """Rewards log 3 and log 4: 1 - 3/4 + 4/5 = 1.05; slopes -3/16 and 4/25."""
    batch = pairs([math.log(3)], [math.log(4)])
    loss = apo_zero(APOZeroConfig(beta=1), batch)
    close(loss.values, [1.05])
    chosen, rejected = slopes(loss, batch)
    close(chosen, [-3 / 16])
    close(rejected, [4 / 25])


def test_gradient_on_both_flanks() -> None:
    """Where float32 rounds the sigmoid to 1 its slope is still e^-40, as it is on the other flank."""
    batch = pairs([-40.0], [40.0], torch.float32)
    chosen, rejected = slopes(apo_zero(APOZeroConfig(beta=1), batch), batch)
    assert -chosen.item() == pytest.approx(math.exp(-40), rel=1e-5)
    assert rejected.item() == pytest.approx(math.exp(-40), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ends(dtype: torch.dtype) -> None:
    _, _, (chosen, rejected) = at_the_ends(find("apo_zero"), APOZeroConfig(), dtype=dtype)
    assert (chosen <= 0).all() and (rejected >= 0).all()


def test_beta_must_be_positive() -> None:
    with pytest.raises(UserError, match=r"^apo_zero: beta = 0: Input should be greater than 0$"):
        parse(APOZeroConfig, {"beta": 0}, "apo_zero")
