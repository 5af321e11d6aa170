"""Who judges in tests: functions of the texts, by which no two responses are likely to be alike."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any


def number(text: str) -> float:
    """Between 0 and 1, fixed by a text and as good as random."""
    return zlib.crc32(text.encode()) / 2**32


def circular(prompts: Sequence[Any], a: Sequence[str], b: Sequence[str]) -> list[float]:
    """A preference that goes round in circles: a wins where its number is ahead of b's by less than half a turn."""
    turns = [(number(one) - number(other)) % 1.0 for one, other in zip(a, b, strict=True)]
    return [0.5 if turn in (0.0, 0.5) else 0.9 if turn < 0.5 else 0.2 for turn in turns]


def vowels(prompts: Sequence[Any], completions: Sequence[str], rows: Sequence[Any]) -> list[float]:
    """A score: the share of vowels; its rows have an `answer`."""
    assert all("answer" in row for row in rows)
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) + 1e-3 * number(text) for text in completions]
