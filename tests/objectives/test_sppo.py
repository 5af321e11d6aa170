"""SPPO with hard probabilities against the authors' code, TRL and numbers worked by hand."""

from __future__ import annotations

import pytest
import torch
from golden import close, golden
from hand import at_the_ends, pairs, slopes

from posttrain.objectives.preference.sppo import SPPOConfig, sppo
from posttrain.registry import find
from posttrain.schema import UserError, parse


@pytest.mark.parametrize(("file", "total"), [("baseline_official_sppo_hard", False), ("baseline_trl_sppo_hard", True)])
def test_released_code(file: str, total: bool) -> None:
    official = golden(file)
    loss = official.agree(find("sppo"), SPPOConfig(beta=official.inputs["beta"], total=total))
    for role in ("chosen", "rejected"):
        if f"{role}_rewards" in official.outputs:
            close(loss.metrics[f"rewards/{role}"], official.outputs[f"{role}_rewards"])


def test_by_hand() -> None:
    """beta 0.25: targets 2 and -2. Log-ratios 1 and -4: ((1 - 2)^2 + (-4 + 2)^2) / 2 = 2.5, slopes -1 and -2."""
    batch = pairs([1.0], [-4.0])
    loss = sppo(SPPOConfig(beta=0.25), batch)
    close(loss.values, [2.5])
    close(loss.metrics["rewards/rejected"], [-1.0])
    chosen, rejected = slopes(loss, batch)
    close(chosen, [-1.0])
    close(rejected, [-2.0])
    close(sppo(SPPOConfig(beta=0.25, total=True), batch).values, [5.0])


@pytest.mark.parametrize(("total", "start"), [(False, 4.0), (True, 8.0)])
def test_start(total: bool, start: float) -> None:
    config = SPPOConfig(beta=0.25, total=total)
    close(sppo(config, pairs([0.0], [0.0])).values, [start], 0)
    assert find("sppo").start(config) == start


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ends(dtype: torch.dtype) -> None:
    chosen, rejected, gradients = at_the_ends(find("sppo"), SPPOConfig(beta=0.1), dtype=dtype)
    assert (gradients[0].sign() == (chosen - 5).sign()).all() and (gradients[1].sign() == (rejected + 5).sign()).all()


def test_beta_must_be_positive() -> None:
    with pytest.raises(UserError, match=r"^sppo: beta = 0: Input should be greater than 0$"):
        parse(SPPOConfig, {"beta": 0}, "sppo")
