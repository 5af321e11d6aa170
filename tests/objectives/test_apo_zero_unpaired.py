"""APO-zero on single completions against TRL, APO-zero on pairs and numbers worked by hand."""

from __future__ import annotations

from math import exp

import pytest
import torch
from golden import close, golden

from posttrain.objectives.preference.apo_zero_unpaired import APOZeroUnpairedConfig, apo_zero_unpaired
from posttrain.registry import find
from posttrain.schema import UserError, parse
from posttrain.stats import Completions, Labelled

UNPAIRED = find("apo_zero_unpaired")


def test_released_code() -> None:
    official = golden("kto_trl_apo_zero_unpaired")
    outputs = {**official.outputs, "per_example_losses": official.outputs["losses_in_batch_order"]}
    loss = official.agree(UNPAIRED, APOZeroUnpairedConfig(beta=0.1), outputs=outputs, statistics=official.labelled())
    close(loss.metrics["rewards/desirable"].mean(), outputs["metrics"]["rewards/chosen"])
    close(loss.metrics["rewards/undesirable"].mean(), outputs["metrics"]["rewards/rejected"])


def test_by_hand() -> None:
    """beta 1/2: rewards 1 and -3; losses 2 sigmoid(-1) and 3 sigmoid(-3)."""
    logps = torch.tensor([2.0, -6.0], dtype=torch.float64, requires_grad=True)
    one = Completions(logps=logps, lengths=torch.ones(2, dtype=torch.int64), reference_logps=torch.zeros_like(logps))
    config = APOZeroUnpairedConfig(beta=0.5, desirable_weight=2, undesirable_weight=3)
    loss = apo_zero_unpaired(config, Labelled(completion=one, label=torch.tensor([1, 0])))
    close(loss.values, [2 / (1 + exp(1)), 3 / (1 + exp(3))])
    loss.values.sum().backward()
    assert logps.grad[0] < 0 < logps.grad[1]


def test_two_rows_of_a_pair_are_apo_zero() -> None:
    """Its released values on pairs are the sum of the two rows'."""
    official = golden("baseline_trl_apo_zero")
    pairs = official.pairs()
    both = [
        apo_zero_unpaired(APOZeroUnpairedConfig(beta=0.1), Labelled(completion=one, label=torch.full((4,), label))).values
        for one, label in ((pairs.chosen, 1.0), (pairs.rejected, 0.0))
    ]
    close(both[0] + both[1], official.outputs["per_example_losses"])


def test_needs_nothing_before_the_step() -> None:
    assert UNPAIRED.before is None


def test_beta_must_be_positive() -> None:
    with pytest.raises(UserError, match=r"^objective: beta = 0: Input should be greater than 0$"):
        parse(APOZeroUnpairedConfig, {"beta": 0}, "objective")
