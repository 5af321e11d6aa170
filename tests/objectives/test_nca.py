"""NCA against TRL, the authors' code and numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from golden import close, golden
from hand import at_the_ends, pairs

from posttrain.objectives.preference.nca import NCAConfig, nca
from posttrain.registry import find
from posttrain.schema import UserError, parse


@pytest.mark.parametrize(
    ("file", "biased"), [("baseline_trl_nca_pair", False), ("baseline_biasednca", True), ("baseline_trl_bco_pair", True)]
)
def test_released_code(file: str, biased: bool) -> None:
    official = golden(file)
    loss = official.agree(find("nca"), NCAConfig(beta=official.inputs["beta"], biased=biased))
    for role in ("chosen", "rejected"):
        if f"{role}_rewards" in official.outputs:
            close(loss.metrics[f"rewards/{role}"], official.outputs[f"{role}_rewards"])


def test_by_hand() -> None:
    """Rewards log 3 and -log 3, so sigmoids 3/4 and 1/4: -log(3/4) - (log(1/4) + log(3/4)) / 2; biased -2 log(3/4)."""
    batch = pairs([math.log(3)], [-math.log(3)])
    close(nca(NCAConfig(beta=1), batch).values, [-1.5 * math.log(0.75) - 0.5 * math.log(0.25)])
    close(nca(NCAConfig(beta=1, biased=True), batch).values, [-2 * math.log(0.75)])


@pytest.mark.parametrize("biased", [False, True])
def test_start(biased: bool) -> None:
    close(nca(NCAConfig(biased=biased), pairs([0.0], [0.0])).values, [2 * math.log(2)], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ends(dtype: torch.dtype) -> None:
    """Unbiased, the chosen reward is pulled to log 2 and the rejected one pushed down from anywhere above."""
    chosen, _, gradients = at_the_ends(find("nca"), NCAConfig(), dtype=dtype)
    assert (gradients[0][chosen < 100] < 0).all() and (gradients[0][chosen > 100] > 0).all()
    assert (gradients[1] > 0).all()


def test_beta_must_be_positive() -> None:
    with pytest.raises(UserError, match=r"^nca: beta = 0: Input should be greater than 0$"):
        parse(NCAConfig, {"beta": 0}, "nca")
