"""MMPO against its formula worked by hand, its optimum and DPO."""

from __future__ import annotations

import math

import pytest
import torch
from golden import close, tensor
from hand import pairs, slopes

from posttrain.objectives.preference.dpo import DPOConfig, dpo
from posttrain.objectives.preference.mmpo import MMPOConfig, ScoredPairs, mmpo
from posttrain.registry import find
from posttrain.schema import UserError, parse
from posttrain.stats import Pairs, columns_of, roles_of


def scored(batch: Pairs, chosen: list[float], rejected: list[float]) -> ScoredPairs:
    """The same pairs with these scores."""
    return ScoredPairs(
        chosen=batch.chosen, rejected=batch.rejected, score_chosen=tensor(chosen), score_rejected=tensor(rejected)
    )


def test_by_hand() -> None:
    """gamma log 3 and scores 1 apart: q = 3/4. beta 1, margin log 2, s = 2/3: loss -3/4 log(2/3) - 1/4 log(1/3).

    Slope -(q - s) = -1/12.
    """
    batch = scored(pairs([math.log(2)], [0.0]), [8.0], [7.0])
    loss = mmpo(MMPOConfig(beta=1, gamma=math.log(3)), batch)
    close(loss.values, [-0.75 * math.log(2 / 3) - 0.25 * math.log(1 / 3)])
    close(loss.metrics["mmpo/target"], [0.75])
    close(loss.metrics["mmpo/error"], [(0.75 - 2 / 3) ** 2])
    chosen, rejected = slopes(loss, batch)
    close(chosen, [-1 / 12])
    close(rejected, [1 / 12])


def test_least_where_margins_match_scores() -> None:
    """beta 0.5, gamma 2, scores 3, 0 and -1 apart: rewards have to be 6, 0 and -2 apart, log-ratios twice that."""
    batch = scored(pairs([12.0, 0.0, -4.0], [0.0] * 3), [4.0, 2.0, 0.0], [1.0, 2.0, 1.0])
    loss = mmpo(MMPOConfig(beta=0.5, gamma=2), batch)
    close(slopes(loss, batch)[0], [0.0] * 3, 1e-12)


def test_scores_far_apart_are_dpo() -> None:
    batch = pairs([1.0, -2.0], [0.5, 3.0])
    far = mmpo(MMPOConfig(beta=0.1), scored(batch, [1000.0] * 2, [0.0] * 2))
    close(far.values, dpo(DPOConfig(), batch).values.tolist(), 1e-12)


@pytest.mark.parametrize("scores", [(0.0, 1000.0), (5.0, 5.0), (1000.0, 0.0)])
def test_ends(scores: tuple[float, float]) -> None:
    batch = pairs([-1000.0, 0.0, 1000.0], [1000.0, 0.0, -1000.0], torch.float32)
    rows = scored(batch, *([score] * 3 for score in scores))
    loss = mmpo(MMPOConfig(), rows)
    assert loss.values.dtype == torch.float32 and loss.values.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in slopes(loss, rows))


def test_takes_its_scores_from_the_rows() -> None:
    assert roles_of(ScoredPairs) == ["chosen", "rejected"]
    assert list(columns_of(ScoredPairs)) == ["score_chosen", "score_rejected"]
    assert find("mmpo").family is ScoredPairs


def test_gamma_must_be_positive() -> None:
    with pytest.raises(UserError, match=r"^mmpo: gamma = 0: Input should be greater than 0$"):
        parse(MMPOConfig, {"gamma": 0}, "mmpo")
