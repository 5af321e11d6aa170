"""Scorers that are rules on the text of a completion. Each is a settings dataclass that is called as a scorer is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from ..conversations import Text
from ..schema import NonNegativeInt, UserError
from .scorer import Row

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
_MARKED = re.compile(r"####\s*(-?\$?[\d,]*\.?\d+)")


@dataclass(frozen=True, kw_only=True)
class Length:
    """The length of the completion, or how near it is to a target."""

    unit: Literal["words", "characters"] = "words"
    """What is counted."""

    target: NonNegativeInt | None = None
    """The score is minus the distance from it; None: the length itself."""

    def __call__(self, prompts: Sequence[Text], completions: Sequence[str], rows: Sequence[Row]) -> list[float]:
        """[rows] the scores."""
        lengths = [len(text.split()) if self.unit == "words" else len(text) for text in completions]
        return [float(length if self.target is None else -abs(length - self.target)) for length in lengths]


@dataclass(frozen=True, kw_only=True)
class Regex:
    """1 where the completion matches a pattern, 0 elsewhere."""

    pattern: str
    """A regular expression of Python; a dot matches line breaks too."""

    whole: bool = False
    """The pattern has to match all of the completion, up to blanks around it."""

    @cached_property
    def compiled(self) -> re.Pattern[str]:
        """The pattern.

        Raises:
            UserError: it is no regular expression.
        """
        try:
            return re.compile(self.pattern, re.DOTALL)
        except re.error as error:
            raise UserError(f"reward.pattern = {self.pattern!r} is no regular expression: {error}") from None

    def __call__(self, prompts: Sequence[Text], completions: Sequence[str], rows: Sequence[Row]) -> list[float]:
        """[rows] the scores."""
        match = self.compiled.fullmatch if self.whole else self.compiled.search
        return [float(match(text.strip()) is not None) for text in completions]


@dataclass(frozen=True, kw_only=True)
class Format(Regex):
    """1 where the completion is a thought and an answer, each between its tags, and nothing else; 0 elsewhere."""

    pattern: str = r"<think>(?:(?!</?think>).)*</think>\s*<answer>(?:(?!</?answer>).)*</answer>"
    """The form."""

    whole: bool = True
    """The pattern has to match all of the completion."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """1 where the number that a completion ends with equals the right one, 0 elsewhere; for data such as GSM8K.

    The number after `####` counts where there is one, the last number of the text otherwise.
    """

    column: str = "answer"
    """Column with the right answer, alone or at the end of a solution."""

    marked: bool = False
    """Count only a number after `####`."""

    def __call__(self, prompts: Sequence[Text], completions: Sequence[str], rows: Sequence[Row]) -> list[float]:
        """[rows] the scores."""
        return [
            float(final_number(text, marked=self.marked) == self._right(row))
            for text, row in zip(completions, rows, strict=True)
        ]

    def _right(self, row: Row) -> float:
        if self.column not in row:
            raise UserError(f"reward.column: no column {self.column!r}; columns: {', '.join(row) or 'none'}")
        right = final_number(str(row[self.column]))
        if right is None:
            raise ValueError(f"column {self.column!r} holds no number: {str(row[self.column])[:60]!r}")
        return right


@dataclass(frozen=True, kw_only=True)
class Vader:
    """The sentiment of the completion by VADER, a lexicon with rules (Hutto and Gilbert 2014): -1 negative to 1 positive."""

    with_prompt: bool = False
    """Judge prompt and completion together."""

    @cached_property
    def analyser(self) -> Any:
        """VADER with its lexicon.

        Raises:
            UserError: it is not installed.
        """
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError:
            raise UserError("reward vader: vaderSentiment is not installed; pip install 'posttrain[sentiment]'") from None
        return SentimentIntensityAnalyzer()

    def __call__(self, prompts: Sequence[Text], completions: Sequence[str], rows: Sequence[Row]) -> list[float]:
        """[rows] the scores."""
        texts = (
            [said(prompt) + text for prompt, text in zip(prompts, completions, strict=True)]
            if self.with_prompt
            else completions
        )
        return [self.analyser.polarity_scores(text)["compound"] for text in texts]


def final_number(text: str, *, marked: bool = False) -> float | None:
    """The number after the last `####`, else (unless `marked`) the last number of a text; None where there is none."""
    found = _MARKED.findall(text) or ([] if marked else _NUMBER.findall(text))
    return float(found[-1].replace(",", "").replace("$", "")) if found else None


def said(prompt: Text) -> str:
    """A prompt as text: its own, or that of its messages one under the other."""
    return prompt if isinstance(prompt, str) else "".join(f"{message['content']}\n\n" for message in prompt)
