"""Which of the responses to a prompt are learned from: pure functions of scores, or of who beats whom.

A contest is a generator: it yields the comparisons that it wants next, pairs of numbers of responses, is sent the probability
of each that the first one is better, and returns its `Verdict`. So the contests of many prompts go on side by side, and a
preference model sees the comparisons of all of them together (`settle`).

Source of the tournament: Zhang et al. 2024, arXiv:2407.00617, in the authors' code for 8 responses and for any other number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

Match = tuple[int, int]


@dataclass(frozen=True)
class Verdict:
    """What became of the responses to one prompt."""

    best: int
    """Number of the response that is learned from."""

    worst: int
    """Number of the one it is set against."""

    preference: float
    """P(best is preferred to worst), asked for by itself; at most 1/2 where preferences go round in circles, or for a tie."""

    wins: tuple[float, ...] | None = None
    """Of each response, where all were compared: the mean probability that it beats another."""

    scores: tuple[float, ...] | None = None
    """Of each response, where there are scores."""

    @property
    def decided(self) -> bool:
        """Whether the best is really preferred to the worst."""
        return self.preference > 0.5


Contest = Generator[list[Match], list[float], Verdict]


def tournament(n: int) -> Contest:
    """Best and worst of n >= 2 responses by knock-out: brackets for 8 (10 comparisons), else two scans (2n - 3).

    After these comes the match of the two. In the bracket the winners of the first round play for the best, the losers for the
    worst. A scan goes through the responses and keeps the winner as the best, then through all others and keeps the loser.
    """
    if n == 8:
        first = [(0, 1), (2, 3), (4, 5), (6, 7)]
        won = yield first
        winners, losers = _sides(first, won)
        while len(winners) > 1:
            up, down = list(zip(winners[::2], winners[1::2], strict=True)), list(zip(losers[::2], losers[1::2], strict=True))
            won = yield [*up, *down]
            winners, _ = _sides(up, won[: len(up)])
            _, losers = _sides(down, won[len(up) :])
        best, worst = winners[0], losers[0]
    else:
        best = 0
        for other in range(1, n):
            (won,) = yield [(best, other)]
            best = best if won > 0.5 else other
        worst, *others = (one for one in range(n) if one != best)
        for other in others:
            (won,) = yield [(worst, other)]
            worst = other if won > 0.5 else worst
    (final,) = yield [(best, worst)]
    return Verdict(best, worst, final)


def everyone(n: int) -> Contest:
    """Best and worst of n >= 2 responses by the mean probability to beat another, after all n (n - 1) / 2 comparisons."""
    matches = [(i, j) for i in range(n) for j in range(i + 1, n)]
    won = yield matches
    wins = [0.0] * n
    for (i, j), p in zip(matches, won, strict=True):
        wins[i] += p / (n - 1)
        wins[j] += (1 - p) / (n - 1)
    best, worst = best_worst(wins)
    known = dict(zip(matches, won, strict=True))
    return Verdict(best, worst, known[best, worst] if best < worst else 1 - known[worst, best], wins=tuple(wins))


def by_score(scores: Sequence[float]) -> Verdict:
    """Best and worst of two responses or more by their scores; the preference is that of Bradley and Terry."""
    best, worst = best_worst(scores)
    return Verdict(best, worst, won(scores[best], scores[worst]), scores=tuple(scores))


def best_of_n(scores: Sequence[float]) -> int:
    """Number of the highest score, the first of several."""
    return max(range(len(scores)), key=lambda i: scores[i])


def best_worst(scores: Sequence[float]) -> tuple[int, int]:
    """Numbers of the highest and of the lowest score of two or more, the first and the last of several."""
    return best_of_n(scores), min(reversed(range(len(scores))), key=lambda i: scores[i])


def won(one: float, other: float) -> float:
    """P(one is preferred to the other) by Bradley and Terry, from their scores; without overflow."""
    return 0.5 * (1 + math.tanh((one - other) / 2))


def settle(contests: Sequence[Contest], compare: Callable[[list[tuple[int, Match]]], list[float]]) -> list[Verdict]:
    """Play contests to their ends, side by side.

    Args:
        contests: fresh ones.
        compare: (number of the contest, match) of each comparison of a round -> the probabilities that the first one is better.
    """
    verdicts: dict[int, Verdict] = {}
    wanted = {number: next(contest) for number, contest in enumerate(contests)}
    while wanted:
        asked = [(number, match) for number, matches in wanted.items() for match in matches]
        answers = iter(compare(asked))
        replies = {number: [next(answers) for _ in matches] for number, matches in wanted.items()}
        wanted = {}
        for number, reply in replies.items():
            try:
                wanted[number] = contests[number].send(reply)
            except StopIteration as end:
                verdicts[number] = end.value
    return [verdicts[number] for number in range(len(contests))]


def _sides(matches: Sequence[Match], won: Sequence[float]) -> tuple[list[int], list[int]]:
    """Winners and losers of matches."""
    played = [(i, j) if p > 0.5 else (j, i) for (i, j), p in zip(matches, won, strict=True)]
    return [winner for winner, _ in played], [loser for _, loser in played]
