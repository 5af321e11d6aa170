"""TDPO against the authors' code and numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from golden import close, golden

from posttrain.objectives.preference.tdpo import TDPOConfig, tdpo
from posttrain.recipe import load_run
from posttrain.references import kind_of
from posttrain.registry import find
from posttrain.schema import UserError, parse
from posttrain.stats import Completions, Pairs

TDPO = find("tdpo")


def test_authors_code() -> None:
    official = golden("tdpo1")
    loss = official.agree(TDPO, TDPOConfig(beta=official.inputs["beta"], version=1))
    for role in ("chosen", "rejected"):
        close(loss.metrics[f"kl/{role}"], official.outputs[f"seq_kl_{role}"])
        close(loss.metrics[f"rewards/{role}"], official.outputs[f"{role}_rewards"])


def test_by_hand() -> None:
    """beta 0.5; log-ratios 1 and -1, KLs 0.4 and 0.8.

    Version 1: rewards 0.7 and -0.1. Version 2, alpha 0.5: 0.5 * (1 + 0.2) = 0.6 and 0.5 * (-1 + 0.4) = -0.3.
    """
    for version, chosen, rejected in ((1, 0.7, -0.1), (2, 0.6, -0.3)):
        loss = tdpo(TDPOConfig(beta=0.5, version=version), pairs())
        close(loss.metrics["rewards/chosen"], [chosen])
        close(loss.metrics["rewards/rejected"], [rejected])
        close(loss.values, [math.log1p(math.exp(rejected - chosen))])


def test_version_2_holds_the_chosen_kl() -> None:
    """Its gradient is beta * alpha * sigmoid(-margin) on the rejected side and nothing on the chosen one."""
    batch = pairs()
    tdpo(TDPOConfig(beta=0.5), batch).values.sum().backward()
    assert batch.chosen["forward_kl"].grad is None
    close(batch.rejected["forward_kl"].grad, [0.25 / (1 + math.exp(0.9))])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"version": 3}, "objective: version = 3: Input should be 1 or 2"),
        ({"alpha": -1}, "objective: alpha = -1: Input should be greater than or equal to 0"),
    ],
)
def test_refusals(values: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(TDPOConfig, values, "objective")
    assert str(error.value) == message


def test_cached_log_probs_are_refused() -> None:
    run = load_run("tdpo", overrides=["model=policy", "data=pairs.jsonl", "reference=cached"])
    with pytest.raises(UserError, match=r"^reference.kind = 'cached': tdpo reads the reference over the whole vocabulary"):
        kind_of(run)


def pairs() -> Pairs:
    """One pair of one-token completions: log-ratios 1 and -1, forward KLs 0.4 and 0.8."""

    def one(logratio: float, kl: float) -> Completions:
        number = lambda value: torch.tensor([value], dtype=torch.float64)  # noqa: E731
        return Completions(
            logps=number(logratio).requires_grad_(),
            lengths=torch.tensor([1]),
            reference_logps=number(0.0),
            more={"forward_kl": number(kl).requires_grad_()},
        )

    return Pairs(chosen=one(1.0, 0.4), rejected=one(-1.0, 0.8))
