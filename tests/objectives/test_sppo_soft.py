"""SPPO with estimated probabilities against the authors' code, SPPO and numbers worked by hand."""

from __future__ import annotations

import pytest
import torch
from golden import close, golden, tensor
from hand import pairs, slopes

from posttrain.objectives.preference.sppo import SPPOConfig, sppo
from posttrain.objectives.preference.sppo_soft import PairsWithWins, SPPOSoftConfig, sppo_soft
from posttrain.registry import find
from posttrain.schema import UserError, parse
from posttrain.stats import Pairs, columns_of, roles_of


def with_wins(batch: Pairs, chosen: list[float], rejected: list[float]) -> PairsWithWins:
    """The same pairs with these probabilities."""
    return PairsWithWins(chosen=batch.chosen, rejected=batch.rejected, chosen_win=tensor(chosen), rejected_win=tensor(rejected))


def test_released_code() -> None:
    official = golden("baseline_official_sppo_soft")
    wins = official.inputs["chosen_probs_win"], official.inputs["chosen_probs_lose"]
    loss = sppo_soft(SPPOSoftConfig(beta=official.inputs["beta"]), with_wins(official.pairs(), *wins))
    close(loss.values, official.outputs["per_example_losses"])
    close(loss.values.mean(), official.outputs["loss"])
    close(torch.autograd.grad(loss.values.mean(), official.policy_logits)[0], official.outputs["grad_policy_logits"])
    for role in ("chosen", "rejected"):
        close(loss.metrics[f"rewards/{role}"], official.outputs[f"{role}_rewards"])


def test_by_hand() -> None:
    """beta 0.25, p 0.75 and 0.5: targets 1 and 0. Log-ratios 3 and -1: ((3 - 1)^2 + 1) / 2 = 2.5, slopes 2 and -1."""
    batch = with_wins(pairs([3.0], [-1.0]), [0.75], [0.5])
    loss = sppo_soft(SPPOSoftConfig(beta=0.25), batch)
    close(loss.values, [2.5])
    chosen, rejected = slopes(loss, batch)
    close(chosen, [2.0])
    close(rejected, [-1.0])


def test_certain_wins_are_sppo() -> None:
    batch = pairs([1.0, 5.0], [0.0, -3.0])
    soft = sppo_soft(SPPOSoftConfig(), with_wins(batch, [1.0, 1.0], [0.0, 0.0]))
    close(soft.values, sppo(SPPOConfig(), batch).values.tolist(), 1e-9)


def test_takes_its_probabilities_from_the_rows() -> None:
    assert roles_of(PairsWithWins) == ["chosen", "rejected"]
    assert list(columns_of(PairsWithWins)) == ["chosen_win", "rejected_win"]
    assert find("sppo_soft").family is PairsWithWins


def test_beta_must_be_positive() -> None:
    with pytest.raises(UserError, match=r"^sppo_soft: beta = 0: Input should be greater than 0$"):
        parse(SPPOSoftConfig, {"beta": 0}, "sppo_soft")
