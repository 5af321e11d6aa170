"""Selection against the protocol of INPO's code, and by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from posttrain.selection import Contest, Match, Verdict, best_of_n, best_worst, by_score, everyone, settle, tournament

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "inpo_tournament.json").read_text())
CASES = list(zip(GOLDEN["inputs"]["cases"], GOLDEN["outputs"]["cases"], strict=True))


def play(contest: Contest, wins: list[list[float]]) -> tuple[Verdict, list[list[Match]]]:
    """The verdict where response i beats j with the probability wins[i][j], and the rounds that it took."""
    rounds: list[list[Match]] = []

    def compare(asked: list[tuple[int, Match]]) -> list[float]:
        rounds.append([match for _, match in asked])
        return [wins[i][j] for _, (i, j) in asked]

    (verdict,) = settle([contest], compare)
    return verdict, rounds


@pytest.mark.parametrize(("case", "expected"), CASES)
def test_tournament_of_the_released_code(case: dict[str, Any], expected: dict[str, Any]) -> None:
    """The last comparison is the final pair's own."""
    verdict, rounds = play(tournament(case["K"]), case["P"])
    assert (verdict.best, verdict.worst) == (expected["win"], expected["lose"])
    assert verdict.preference == pytest.approx(expected["final_P"], abs=1e-12)
    assert verdict.decided is expected["kept"]
    assert sum(map(len, rounds)) == expected["pm_pair_calls"] + 1
    assert rounds[-1] == [(verdict.best, verdict.worst)]


def test_a_bracket_is_four_rounds() -> None:
    """And winners and losers play side by side."""
    _, rounds = play(tournament(8), CASES[0][0]["P"])
    assert [len(one) for one in rounds] == [4, 4, 2, 1]


def test_two_responses() -> None:
    assert play(tournament(2), [[0.5, 0.3], [0.7, 0.5]])[0] == Verdict(1, 0, 0.7)
    assert not play(tournament(2), [[0.5, 0.5], [0.5, 0.5]])[0].decided


@pytest.mark.parametrize("n", [2, 3, 5, 8, 9])
def test_where_there_is_an_order_all_find_its_ends(n: int) -> None:
    scores = [((7 * i) % n) - 0.3 * i for i in range(n)]
    wins = [[1 / (1 + math.exp(b - a)) for b in scores] for a in scores]
    ends = best_worst(scores)
    for verdict in (play(tournament(n), wins)[0], play(everyone(n), wins)[0], by_score(scores)):
        assert (verdict.best, verdict.worst) == ends
        assert verdict.preference == pytest.approx(wins[ends[0]][ends[1]], abs=1e-12) and verdict.decided


def test_everyone_against_everyone_by_hand() -> None:
    """0 beats 1 with 0.9 and 2 with 0.2, 1 beats 2 with 0.6: wins 0.55, 0.35, 0.6."""
    wins = [[0.5, 0.9, 0.2], [0.1, 0.5, 0.6], [0.8, 0.4, 0.5]]
    verdict, rounds = play(everyone(3), wins)
    assert rounds == [[(0, 1), (0, 2), (1, 2)]]
    assert verdict.wins == pytest.approx((0.55, 0.35, 0.6))
    assert (verdict.best, verdict.worst) == (2, 1)
    assert verdict.preference == pytest.approx(0.4) and not verdict.decided


def test_scores() -> None:
    verdict = by_score([1.0, 3.0, 1.0, 3.0])
    assert (verdict.best, verdict.worst) == (1, 2)
    assert verdict.preference == pytest.approx(1 / (1 + math.exp(-2)))
    assert verdict.scores == (1.0, 3.0, 1.0, 3.0)
    assert not by_score([2.0, 2.0]).decided and by_score([2.0, 2.0]).best != by_score([2.0, 2.0]).worst
    assert by_score([-1e4, 1e4]).preference == 1.0
    assert best_of_n([0.0, 2.0, 2.0]) == 1


def test_contests_of_many_prompts_are_asked_together() -> None:
    asked: list[int] = []

    def compare(matches: list[tuple[int, Match]]) -> list[float]:
        asked.append(len(matches))
        return [1.0 if i < j else 0.0 for _, (i, j) in matches]

    verdicts = settle([tournament(8), tournament(8), tournament(3)], compare)
    assert asked == [4 + 4 + 1, 4 + 4 + 1, 2 + 2 + 1, 1 + 1 + 1]
    assert [(one.best, one.worst) for one in verdicts] == [(0, 7), (0, 7), (0, 2)]
