"""Who of the responses to a prompt is the best and who the worst: a line of JSON a prompt, made by whoever judges.

The file grows some prompts at a time, whose comparisons are asked for together; what was judged before an interruption is kept.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from .conversations import Text
from .replacing import replacing
from .rewards.scorer import Preference, Reward, Row, Scored
from .schema import UserError
from .selection import Match, Verdict, by_score, everyone, settle, tournament, won

TOGETHER = 32
"""Prompts that are judged at a time."""


@dataclass(frozen=True)
class Asked:
    """A prompt as those who judge read it."""

    prompt: Text
    """Text or messages."""

    row: Row
    """The columns of its row in the data."""


@dataclass(frozen=True)
class Judge:
    """Who compares responses, and who scores them."""

    preference: Preference | None
    """Compares two; None: the scores do, by Bradley and Terry."""

    reward: Reward | None
    """Scores each; None: nobody does."""

    def scores(self, asked: Sequence[Asked], texts: Sequence[str]) -> Scored | None:
        """The score of each response; None without a reward."""
        if self.reward is None:
            return None
        return self.reward([one.prompt for one in asked], texts, [one.row for one in asked])

    def wins(self, asked: Sequence[Asked], a: Sequence[str], b: Sequence[str]) -> list[float]:
        """The probability that each response of a is preferred to that of b."""
        if self.preference is not None:
            return self.preference([one.prompt for one in asked], a, b) if asked else []
        ours, theirs = self.scores(asked, a), self.scores(asked, b)
        assert ours is not None and theirs is not None, "nobody judges"
        return [won(one, other) for one, other in zip(ours.total, theirs.total, strict=True)]

    def verdicts(self, asked: Sequence[Asked], responses: Sequence[Sequence[str]], select: str) -> list[Verdict]:
        """The verdict on the responses to each prompt.

        Args:
            asked: the prompts.
            responses: those to each.
            select: `tournament`, `everyone` or `scores`.
        """
        flat = [(one, text) for one, texts in zip(asked, responses, strict=True) for text in texts]
        said = self.scores([one for one, _ in flat], [text for _, text in flat])
        ends = iter([] if said is None else said.total)
        scores = [None if said is None else tuple(next(ends) for _ in texts) for texts in responses]
        if select == "scores":
            return [by_score(one) for one in scores if one is not None]

        def compare(matches: list[tuple[int, Match]]) -> list[float]:
            if self.preference is None:
                return [won(scores[at][i], scores[at][j]) for at, (i, j) in matches]
            sides = [[responses[at][match[side]] for at, match in matches] for side in (0, 1)]
            return self.wins([asked[at] for at, _ in matches], *sides)

        contest = tournament if select == "tournament" else everyone
        verdicts = settle([contest(len(texts)) for texts in responses], compare)
        return [dataclasses.replace(one, scores=own) for one, own in zip(verdicts, scores, strict=True)]


def judge_file(judge: Judge, prompts: Path, responses: Path, output: Path, select: str) -> Iterator[int]:
    """Judge what is not judged yet of a file of responses; yields the number of prompts that are.

    Args:
        judge: who does.
        prompts: lines with the `source` of each prompt.
        responses: lines with the `completions` of each, as `posttrain sample` writes them.
        output: the file of verdicts.
        select: see `Judge.verdicts`.
    """
    done = _whole(output)
    with output.open("a", encoding="utf-8") as file:
        at, both = 0, zip(lines(prompts), lines(responses), strict=True)
        while part := list(islice(both, TOGETHER)):
            at += len(part)
            if at <= done:
                continue
            asked = [asked_of(line) for line, _ in part]
            verdicts = judge.verdicts(asked, [line["completions"] for _, line in part], select)
            fresh = verdicts[max(0, done - (at - len(part))) :]  # a part that was cut short is judged whole
            file.writelines(json.dumps(dataclasses.asdict(one)) + "\n" for one in fresh)
            file.flush()
            os.fsync(file.fileno())
            yield at


def read_verdicts(path: Path) -> Iterator[Verdict]:
    """The verdicts of a file."""
    for line in lines(path):
        sequences = {name: tuple(line[name]) for name in ("wins", "scores") if line[name] is not None}
        yield Verdict(**{**line, **sequences})


def asked_of(line: dict[str, Any]) -> Asked:
    """The prompt of a line of the file of prompts."""
    source = json.loads(line["source"])
    return Asked(source["prompt"], source["row"])


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines.

    Raises:
        UserError: a line is damaged.
    """
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            try:
                yield json.loads(text)
            except ValueError:
                raise UserError(f"{path}: line {number} is damaged; delete the file, and it is made again") from None


def write_lines(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Write a file of JSON lines, whole or not at all."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _whole(path: Path) -> int:
    """The whole lines of a file, which is made if it is not there; one that was cut off is removed."""
    path.touch()
    content = path.read_bytes()
    kept = content.rfind(b"\n") + 1
    if kept != len(content):
        with path.open("r+b") as file:
            file.truncate(kept)
    return content.count(b"\n")
