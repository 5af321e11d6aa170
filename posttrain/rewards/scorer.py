"""Scorers and preferences, and the check that what they say can be used.

A scorer is a function (prompts, completions, rows) -> one number each, higher is better. A prompt is text or messages, a
completion is text, a row holds the columns of the data set (an answer to compare with, for one). A preference is a function
(prompts, a, b) -> the probability that completion a is better than b. Whatever they are made of, they are called through
`Scorer` and `Preference`, which name the row that cannot be used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..conversations import Text
from ..schema import UserError

Row = Mapping[str, Any]
Score = Callable[[Sequence[Text], Sequence[str], Sequence[Row]], Sequence[float]]
Compare = Callable[[Sequence[Text], Sequence[str], Sequence[str]], Sequence[float]]

_SHOWN = 60
"""Characters of a completion in an error."""


@dataclass(frozen=True)
class Scorer:
    """A scorer whose every number is finite."""

    name: str
    """How errors and metrics call it."""

    score: Score
    """What it is made of."""

    def __call__(self, prompts: Sequence[Text], completions: Sequence[str], rows: Sequence[Row]) -> list[float]:
        """One finite number per completion.

        Raises:
            UserError: it raises, or returns another number of scores, or one that is not a finite number; with the row.
        """
        assert len(prompts) == len(completions) == len(rows), (len(prompts), len(completions), len(rows))
        if not completions:
            return []
        where = f"reward {self.name}"
        try:
            got = list(self.score(prompts, completions, rows))
        except UserError:
            raise
        except Exception as error:
            at = self._culprit(prompts, completions, rows)
            what = f"raises {type(error).__name__}: {' '.join(str(error).split()) or 'without a message'}"
            if at is None:
                raise UserError(f"{where}: {what}, of {len(rows)} rows together and of none alone") from error
            raise UserError(f"{where}: {_row(at, completions[at])}: {what}") from error
        return _finite(got, completions, where)

    def _culprit(self, prompts: Sequence[Text], completions: Sequence[str], rows: Sequence[Row]) -> int | None:
        """The first row that raises by itself."""
        for at in range(len(rows)):
            try:
                self.score(prompts[at : at + 1], completions[at : at + 1], rows[at : at + 1])
            except Exception:
                return at
        return None


@dataclass(frozen=True)
class Scored:
    """What a reward says of completions."""

    total: list[float]
    """The weighted sum of the scores."""

    parts: dict[str, list[float]]
    """What each scorer says, by its name, without its weight."""

    heldout: list[float] | None
    """What the scorer says that is only logged."""


@dataclass(frozen=True)
class Reward:
    """The weighted sum of scorers, and one beside them that nothing is learned from."""

    parts: tuple[tuple[Scorer, float], ...]
    """Each scorer with its weight; names are unique."""

    heldout: Scorer | None = None
    """Only logged."""

    def __call__(self, prompts: Sequence[Text], completions: Sequence[str], rows: Sequence[Row]) -> Scored:
        """The scores of each completion.

        Raises:
            UserError: as `Scorer`.
        """
        said = {one.name: one(prompts, completions, rows) for one, _ in self.parts}
        weights = [weight for _, weight in self.parts]
        total = [math.fsum(w * s for w, s in zip(weights, scores, strict=True)) for scores in zip(*said.values(), strict=True)]
        return Scored(total, said, None if self.heldout is None else self.heldout(prompts, completions, rows))


@dataclass(frozen=True)
class Preference:
    """A preference between two completions; P(a > b) + P(b > a) = 1, whatever order it is asked in."""

    name: str
    """How errors and metrics call it."""

    first: Compare
    """Probability that the completion shown first is the better one, which may depend on the order."""

    def __call__(self, prompts: Sequence[Text], a: Sequence[str], b: Sequence[str]) -> list[float]:
        """P(a > b): the mean over both orders.

        Raises:
            UserError: it returns another number of probabilities, or one outside [0, 1]; with the row.
        """
        where = f"preference {self.name}"
        there = _probabilities(list(self.first([*prompts, *prompts], [*a, *b], [*b, *a])), [*a, *b], where)
        n = len(prompts)
        return [(there[i] + 1 - there[n + i]) / 2 for i in range(n)]


def bradley_terry(scorer: Scorer, rows: Sequence[Row] | None = None) -> Preference:
    """The preference of a scorer: P(a > b) = sigmoid(score of a - score of b).

    Args:
        scorer: its scores.
        rows: columns of the prompts' rows, for scorers that read them.
    """

    def first(prompts: Sequence[Text], a: Sequence[str], b: Sequence[str]) -> list[float]:
        columns = [{}] * len(prompts) if rows is None else [*rows, *rows]
        differences = zip(scorer(prompts, a, columns), scorer(prompts, b, columns), strict=True)
        return [0.5 * (1 + math.tanh((left - right) / 2)) for left, right in differences]  # the sigmoid, without overflow

    return Preference(scorer.name, first)


def mean_wins(preference: Preference, prompt: Text, completions: Sequence[str]) -> list[float]:
    """For each of at least two completions of a prompt the mean probability that it beats another: a score within the group."""
    n = len(completions)
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    wins = preference([prompt] * len(pairs), [completions[i] for i, _ in pairs], [completions[j] for _, j in pairs])
    total = [0.0] * n
    for (i, j), win in zip(pairs, wins, strict=True):
        total[i] += win
        total[j] += 1 - win
    return [value / (n - 1) for value in total]


def _finite(got: list[Any], completions: Sequence[str], where: str) -> list[float]:
    if len(got) != len(completions):
        at = min(len(got), len(completions) - 1)
        raise UserError(
            f"{where}: {len(got)} scores for {len(completions)} completions, at odds at {_row(at, completions[at])}"
        )
    out = []
    for at, value in enumerate(got):
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise UserError(f"{where}: {_row(at, completions[at])}: {value!r} is no number") from None
        if not math.isfinite(number):
            raise UserError(f"{where}: {_row(at, completions[at])}: the score is {number}; a finite number is expected")
        out.append(number)
    return out


def _probabilities(got: list[Any], completions: Sequence[str], where: str) -> list[float]:
    for at, value in enumerate(_finite(got, completions, where)):
        if not 0 <= value <= 1:
            raise UserError(f"{where}: {_row(at, completions[at])}: {value} is no probability")
    return [float(value) for value in got]


def _row(at: int, completion: str) -> str:
    shown = completion if len(completion) <= _SHOWN else f"{completion[:_SHOWN]}..."
    return f"row {at + 1} ({shown!r})"
