"""ORPO against numbers worked by hand, and where a completion is certain."""

from __future__ import annotations

import math

import pytest
import torch
from golden import close
from hand import at_the_ends, completions, pairs, slopes

from posttrain.objectives.preference.orpo import ORPOConfig, orpo
from posttrain.registry import find
from posttrain.schema import UserError, parse
from posttrain.stats import Pairs


def by_hand() -> Pairs:
    """Token probabilities 1/2 and 1/8: mean probability (geometric) 1/4, odds 1/3. The rejected token: 1/10, odds 1/9."""
    return Pairs(chosen=completions([[math.log(1 / 2), math.log(1 / 8)]]), rejected=completions([[math.log(1 / 10)]]))


def test_by_hand() -> None:
    """Ratio of odds 3: -log sigmoid(log 3) = log(4 / 3). NLL of the two tokens log 2 and log 8, their mean log 4."""
    loss = orpo(ORPOConfig(lam=0.5), by_hand())
    close(loss.values, [0.5 * math.log(4 / 3)])
    close(loss.metrics["rewards/chosen"], [math.log(1 / 3)])
    close(loss.metrics["rewards/rejected"], [math.log(1 / 9)])
    close(loss.metrics["nll/chosen"], [math.log(4)])
    assert loss.plus is not None and loss.plus.per == "chosen"
    close(loss.plus.values, [math.log(2), math.log(8)])


def test_gradient_by_hand() -> None:
    """d odds / d a = 1 / (1 - p): 4 / 3 and 10 / 9; weight -sigmoid(-log 3) = -1 / 4 at lam 1; a is a mean of 2."""
    batch = by_hand()
    chosen, rejected = slopes(orpo(ORPOConfig(lam=1.0), batch), batch)
    close(chosen, [-1 / 4 * 4 / 3 / 2] * 2)
    close(rejected, [1 / 4 * 10 / 9])


def test_nll_over_rows() -> None:
    """Two pairs of chosen lengths 2 and 1: the mean over rows is (log 4 + log 2) / 2, over tokens (log 16 + log 2) / 3."""
    batch = Pairs(
        chosen=completions([[math.log(1 / 2), math.log(1 / 8)], [math.log(1 / 2)]]),
        rejected=completions([[math.log(1 / 10)], [math.log(1 / 2)]]),
    )
    rows, tokens = orpo(ORPOConfig(lam=0, nll="rows"), batch), orpo(ORPOConfig(lam=0), batch)
    assert rows.plus is None
    close(rows.values, [math.log(4), math.log(2)])
    close(tokens.values.mean() + tokens.plus.values.mean(), math.log(32) / 3)


@pytest.mark.parametrize("a", [-1e-5, -1e-3, -0.1, -math.log(2), -0.7, -5.0, -40.0, -700.0])
def test_log_odds_keep_their_digits(a: float) -> None:
    """In float32 to 1e-4 nats near certainty, and better elsewhere."""
    got = orpo(ORPOConfig(), pairs([a], [-1.0], torch.float32)).metrics["rewards/chosen"].item()
    assert got == pytest.approx(a - math.log(-math.expm1(a)), rel=2e-6, abs=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ends(dtype: torch.dtype) -> None:
    """A certain completion (log-prob 0) has finite odds, and a gradient."""
    chosen, rejected, gradients = at_the_ends(find("orpo"), ORPOConfig(), (0.0, -1e-7, -1e-3, -1.0, -30.0, -1000.0), dtype)
    out_of_order = chosen <= rejected
    assert (gradients[0][out_of_order] < 0).all() and (gradients[1][out_of_order] > 0).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lam": -1}, "orpo: lam = -1: Input should be greater than or equal to 0"),
        ({"nll": "sum"}, "orpo: nll = 'sum': Input should be 'tokens' or 'rows'"),
    ],
)
def test_refused_settings(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(ORPOConfig, values, "orpo")
    assert str(error.value) == message
