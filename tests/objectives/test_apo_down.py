"""APO-down against TRL and numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from golden import close, golden
from hand import at_the_ends, pairs, slopes

from posttrain.objectives.preference.apo_down import APODownConfig, apo_down
from posttrain.registry import find
from posttrain.schema import UserError, parse


def test_released_code() -> None:
    official = golden("baseline_trl_apo_down")
    official.agree(find("apo_down"), APODownConfig(beta=official.inputs["beta"]))


def test_by_hand() -> None:
    """Rewards log 3 and log 12, margin -log 4: 3/4 + 4/5 = 1.55; slopes 3/16 - 4/25 (chosen) and 4/25."""
    batch = pairs([math.log(3)], [math.log(12)])
    loss = apo_down(APODownConfig(beta=1), batch)
    close(loss.values, [1.55])
    chosen, rejected = slopes(loss, batch)
    close(chosen, [3 / 16 - 4 / 25])
    close(rejected, [4 / 25])


def test_both_fall_at_the_start() -> None:
    """Chosen: 1/4 - 1/4 at the start, then down once the margin is there; rejected: down."""
    batch = pairs([0.0, 1.0], [0.0, -1.0])
    chosen, rejected = slopes(apo_down(APODownConfig(beta=1), batch), batch)
    close(chosen[:1], [0.0])
    assert chosen[1] > 0 and (rejected > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ends(dtype: torch.dtype) -> None:
    _, _, (_, rejected) = at_the_ends(find("apo_down"), APODownConfig(), dtype=dtype)
    assert (rejected >= 0).all()


def test_beta_must_be_positive() -> None:
    with pytest.raises(UserError, match=r"^apo_down: beta = 0: Input should be greater than 0$"):
        parse(APODownConfig, {"beta": 0}, "apo_down")
