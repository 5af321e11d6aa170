"""BCO against its formula in float64 and numbers worked by hand."""

from __future__ import annotations

from math import exp, log

import pytest
import torch
from golden import close, golden
from hand import at_the_ends, pairs, slopes

from posttrain.objectives.preference.bco import BCOConfig, bco
from posttrain.registry import find
from posttrain.schema import UserError, parse
from posttrain.stats import Pairs

BCO = find("bco")


def test_formula() -> None:
    """The golden's delta is the mean of the rewards of its own batch, which is what is remembered of it."""
    file = golden("baseline_bco")
    batch = file.pairs()
    first = bco(BCOConfig(beta=file.inputs["beta"]), batch)
    delta = first.remember["delta"].mean()
    close(delta, file.outputs["delta"])
    loss = bco(BCOConfig(beta=0.1), Pairs(chosen=batch.chosen, rejected=batch.rejected, context={"delta": delta}))
    sides = [torch.tensor(file.outputs[f"{side}_losses"], dtype=torch.float64) for side in ("chosen", "rejected")]
    close(loss.values, ((sides[0] + sides[1]) / 2).tolist())
    close(loss.values.mean(), file.outputs["loss"])
    close(loss.metrics["bco/delta"], file.outputs["delta"])


def test_by_hand() -> None:
    """beta 1, delta 1: chosen 3 gives log(1 + e^-2), rejected -2 gives log(1 + e^-3); slopes are -+ half the sigmoids."""
    batch = pairs([3.0], [-2.0])
    batch = Pairs(chosen=batch.chosen, rejected=batch.rejected, context={"delta": torch.tensor(1.0)})
    loss = bco(BCOConfig(beta=1.0), batch)
    close(loss.values, [(log(1 + exp(-2)) + log(1 + exp(-3))) / 2])
    chosen, rejected = slopes(loss, batch)
    close(chosen, [-0.5 / (1 + exp(2))])
    close(rejected, [0.5 / (1 + exp(3))])
    close(loss.remember["delta"], [3.0, -2.0])


def test_the_first_step_is_measured_against_zero() -> None:
    close(bco(BCOConfig(), pairs([0.0], [0.0])).values, [log(2)])
    assert bco(BCOConfig(), pairs([5.0], [5.0])).metrics["bco/delta"] == 0


def test_what_is_remembered_has_no_gradient() -> None:
    assert not bco(BCOConfig(), pairs([1.0], [2.0])).remember["delta"].requires_grad


def test_at_the_ends() -> None:
    _, _, (chosen, rejected) = at_the_ends(BCO, BCOConfig())
    assert (chosen <= 0).all() and (rejected >= 0).all()


def test_beta_must_be_positive() -> None:
    with pytest.raises(UserError, match=r"^objective: beta = 0: Input should be greater than 0$"):
        parse(BCOConfig, {"beta": 0}, "objective")
