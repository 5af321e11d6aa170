"""The hinge on DPO's margin against TRL and numbers worked by hand."""

from __future__ import annotations

import pytest
import torch
from golden import close, golden
from hand import at_the_ends, pairs, slopes

from posttrain.objectives.preference.hinge import HingeConfig, hinge
from posttrain.registry import find
from posttrain.schema import UserError, parse


def test_released_code() -> None:
    official = golden("baseline_trl_hinge")
    official.agree(find("hinge"), HingeConfig(beta=official.inputs["beta"]))


def test_by_hand() -> None:
    """beta 0.5, so log-ratios have to be 2 apart. Margins 0.5 * 1 and 0.5 * 3: losses 0.5 and 0, slopes -0.5 and 0."""
    batch = pairs([1.0, 2.0], [0.0, -1.0])
    loss = hinge(HingeConfig(beta=0.5), batch)
    close(loss.values, [0.5, 0.0])
    close(loss.metrics["hinge/satisfied"], [0.0, 1.0])
    close(loss.metrics["rewards/margins"], [0.5, 1.5])
    chosen, rejected = slopes(loss, batch)
    close(chosen, [-0.5, 0.0])
    close(rejected, [0.5, 0.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ends(dtype: torch.dtype) -> None:
    chosen, rejected, gradients = at_the_ends(find("hinge"), HingeConfig(), dtype=dtype)
    out_of_order = chosen <= rejected
    assert (gradients[0][out_of_order] < 0).all() and (gradients[1][out_of_order] > 0).all()


def test_beta_must_be_positive() -> None:
    with pytest.raises(UserError, match=r"^hinge: beta = 0: Input should be greater than 0$"):
        parse(HingeConfig, {"beta": 0}, "hinge")
