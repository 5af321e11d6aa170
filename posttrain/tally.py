"""The account of a data set: what was read, kept, cut and left out, and how long the rows are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .schema import UserError

KEPT = "kept"
MARKS = ("truncated", "boundary", "identical")
"""Marks of a row beside its outcome; `boundary`: the prompt's tokens were not a prefix of prompt + completion."""

LENGTHS = ("prompt_tokens", "completion_tokens", "tokens")
"""Lengths of a row before any cut: prompt, longest completion, both."""

_HIGH = 0.05
"""Share of rows cut or left out from which the report warns."""


@dataclass
class Tally:
    """One data set."""

    name: str
    """What the user called it, and the split."""

    layout: str
    """How its rows are read."""

    mapping: Mapping[str, str]
    """What a column is for -> its name."""

    max_length: int
    """The limit on prompt + completion, in tokens."""

    max_prompt: int | None = None
    """The limit on the prompt, in tokens."""

    streaming: bool = False
    """Whether only the first rows of a stream are counted here."""

    outcomes: Counter[str] = field(default_factory=Counter)
    """Rows by outcome: `kept`, or the reason for leaving them out."""

    marks: Counter[str] = field(default_factory=Counter)
    """Rows by mark, kept or not."""

    lengths: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """p50, p95 and maximum of each of `LENGTHS`, in tokens."""

    long_prompts: int = 0
    """Rows whose prompt is longer than `max_prompt`."""

    suggested: tuple[int, int] = (0, 0)
    """A max_length and a max_prompt that hold 98% of the rows."""

    example: dict[str, str] = field(default_factory=dict)
    """The first row kept, as the model sees it: `prompt` and each role."""

    @property
    def read(self) -> int:
        """Rows looked at."""
        return self.outcomes.total()

    @property
    def kept(self) -> int:
        """Rows that were not left out."""
        return self.outcomes[KEPT]

    @property
    def dropped(self) -> dict[str, int]:
        """Reason -> rows left out for it."""
        return {reason: n for reason, n in self.outcomes.items() if reason != KEPT}

    def add(self, columns: Mapping[str, Sequence[Any]]) -> None:
        """Count rows."""
        self.outcomes.update(str(outcome) for outcome in columns["outcome"])
        self.marks.update({mark: int(sum(columns[mark])) for mark in MARKS})
        if self.max_prompt is not None:
            self.long_prompts += int(np.sum(np.asarray(columns["prompt_tokens"]) > self.max_prompt))

    def measure(self, columns: Mapping[str, Sequence[Any]]) -> None:
        """Take the lengths of rows."""
        ample: dict[str, int] = {}
        for name in LENGTHS:
            values = np.asarray(columns[name])
            values = values[np.asarray(columns["tokens"]) > 0]
            if len(values):
                median, high, holding, most = (int(q) for q in np.quantile(values, [0.5, 0.95, 0.98, 1], method="higher"))
                self.lengths[name] = median, high, most
                ample[name] = 64 * -(-holding // 64)
        if ample:
            self.suggested = ample["tokens"], ample["prompt_tokens"]

    def require(
        self, stop: Mapping[str, str], where: str, columns: Mapping[str, Sequence[Any]], numbers: Sequence[int]
    ) -> None:
        """Refuse outcomes that the user does not want dropped.

        Args:
            stop: outcome -> the setting that forbids it.
            where: how the error calls the data set.
            columns: the rows counted last.
            numbers: theirs, from 1.

        Raises:
            UserError: there are such rows.
        """
        for outcome, setting in stop.items():
            if self.outcomes[outcome]:
                at = list(columns["outcome"]).index(outcome)
                tokens = f" with {columns['tokens'][at]} tokens" if "long" in outcome else ""
                raise UserError(
                    f"{where}: {self.outcomes[outcome]} of {self.read} rows: {outcome}, the first is row {numbers[at]}{tokens};"
                    f" data.{setting} = 'error'{self._hint(outcome)}"
                )

    def require_some(self, where: str) -> None:
        """Refuse a data set of which nothing is left.

        Raises:
            UserError: no row was kept.
        """
        if not self.kept:
            reasons = ", ".join(f"{n} {reason}" for reason, n in self.dropped.items())
            rows = f"the first {self.read} rows" if self.streaming else f"{self.read} rows"
            raise UserError(f"{where}: none of {rows} can be used: {reasons}{self._hint(*self.dropped)}")

    def _hint(self, *outcomes: str) -> str:
        if not any("too long" in outcome for outcome in outcomes):
            return ""
        return f" ({self._ample('max_prompt' if self.long_prompts else 'max_length')})"

    def _ample(self, limit: str) -> str:
        """A limit on lengths, and what would do."""
        now, ample = (self.max_prompt, self.suggested[1]) if limit == "max_prompt" else (self.max_length, self.suggested[0])
        return f"data.{limit} = {now}; {ample} would hold 98% of them"

    @property
    def warnings(self) -> list[str]:
        """What the user should know before training."""
        found = []
        cut = self.marks["truncated"] + self.outcomes["too long"] + self.outcomes["completion too long"]
        for limit, long in {"max_prompt": self.long_prompts, "max_length": cut - self.long_prompts}.items():
            if long > _HIGH * self.read:
                which = f"{long} of {self.read} {'prompts' if limit == 'max_prompt' else 'rows'} ({long / self.read:.0%})"
                found.append(f"{self.name}: {which} are longer than {self._ample(limit)}")
        others = self.read - self.kept - self.outcomes["too long"] - self.outcomes["completion too long"]
        if others > _HIGH * self.read:
            found.append(f"{self.name}: {others} of {self.read} rows ({others / self.read:.0%}) are left out, not for length")
        if self.marks["boundary"] > _HIGH * self.read:
            found.append(
                f"{self.name}: in {self.marks['boundary']} of {self.read} rows the prompt's tokens are not a prefix of prompt +"
                " completion; their prompt ends a token or more earlier"
            )
        return found

    def __str__(self) -> str:
        rows = f"first {self.read} rows of the stream" if self.streaming else f"{self.read} rows"
        dropped = ", ".join(f"{reason} {n}" for reason, n in self.dropped.items())
        columns = ", ".join(f"{name} <- {column}" for name, column in self.mapping.items())
        marks = f"{self.marks['truncated']} truncated, {self.marks['boundary']} boundary, {self.marks['identical']} identical"
        left_out = f"{self.read - self.kept} dropped" + (f" ({dropped})" if dropped else "")
        lines = [
            f"{self.name}: {rows}, {self.kept} kept, {left_out}; {marks}",
            f"  {self.layout}; {columns}",
        ]
        if self.lengths:
            spans = ", ".join(
                f"{name} {'/'.join(map(str, self.lengths[key]))}"
                for name, key in zip(("prompt", "longest completion", "together"), LENGTHS, strict=True)
            )
            lines.append(f"  tokens (p50/p95/max): {spans}; max_length {self.max_length}")
        return "\n".join(lines)


@dataclass
class Report:
    """All data sets of a run."""

    train: list[Tally]
    """Those trained on, with the rows held out of them."""

    eval: Tally | None = None
    """A separate one to evaluate on."""

    train_rows: int | None = None
    """Rows of an epoch; None for a stream."""

    eval_rows: int = 0
    """Rows to evaluate on; 0 where there are none, or it is a stream without `eval_size`."""

    live: list[Tally] = field(default_factory=list)
    """Of streams: the counts so far, which grow as this process reads (rows read in worker processes are not seen)."""

    advice: list[str] = field(default_factory=list)
    """What the objective says of the rows and its settings."""

    @property
    def warnings(self) -> list[str]:
        """What the user should know before training."""
        tallies = (*self.train, *([self.eval] if self.eval else []))
        return [*(line for tally in tallies for line in tally.warnings), *self.advice]

    def __str__(self) -> str:
        lines = [str(tally) for tally in self.train]
        if self.eval is not None:
            lines.append(f"eval {self.eval}")
        size = "a stream, counted as it is read" if self.train_rows is None else f"{self.train_rows} rows"
        lines.append(
            f"to train on: {size}; to evaluate on: {self.eval_rows or ('a stream' if self.eval else 'nothing')}"
            f"{' rows' if self.eval_rows else ''}"
        )
        return "\n".join([*lines, *(f"warning: {line}" for line in self.warnings)])
