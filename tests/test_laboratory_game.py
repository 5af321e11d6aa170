"""INPO in a game of circular preferences, solved exactly."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from benchmarks.laboratory import game
from benchmarks.laboratory.claims import divergence, intransitive
from benchmarks.laboratory.world import World


@pytest.fixture(scope="module")
def there() -> World:
    return game.game()


def test_no_reward_explains_the_preferences(there: World) -> None:
    """A quarter of random tournaments' triples are circles."""
    torch.testing.assert_close(there.preference + there.preference.mT, torch.ones_like(there.preference), rtol=0, atol=1e-15)
    assert intransitive(there) > 0.15


def test_nobody_beats_the_nash_policy(there: World) -> None:
    """The best answer gains nothing against it and something against any other policy; and it is no corner of the game."""
    goal = game.nash(there)
    assert (goal.logsumexp(-1).abs() < 1e-12).all() and (game.gain(there, goal).abs() < 1e-12).all()
    assert divergence(goal, there.reference_logp) > 0.05
    for seed in range(3):
        moved = goal + 0.1 * torch.randn(goal.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert (game.gain(there, moved.log_softmax(-1)) > 1e-5).all()


def test_iterates_are_the_steps_of_mirror_descent_and_go_to_the_nash_policy() -> None:
    start, *rows = game.rows()
    assert max(abs(row["KL(iterate, step)"]) for row in rows) < 1e-6
    away = [row["KL(iterate, Nash)"] for row in (start, *rows)]
    assert all(after < 0.75 * before for before, after in pairwise(away))
    assert away[-1] < 0.01 * away[0]
    assert rows[-1]["gain of the best answer"] < 0.01 * start["gain of the best answer"]


def test_soft_labels_make_the_same_step(there: World) -> None:
    ((before, soft),) = game.iterates(there, 1, labels="soft")
    assert divergence(soft.logp, game.step(there, before.author_logp)) < 1e-6
