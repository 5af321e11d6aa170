"""What a run prints: a header, a progress bar with a line of metrics per log, and where everything is at the end.

Without a terminal the lines are plain and there is no bar. Only the first process prints.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainingArguments

COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("loss", "loss", ".4f"),
    ("reward", "reward", ".4f"),
    ("reward/heldout", "held out", ".4f"),
    ("rollouts/length", "length", ".1f"),
    ("rewards/margins", "margin", ".4f"),
    ("rewards/accuracies", "accuracy", ".3f"),
    ("kl", "kl", ".2e"),
    ("grad_norm", "grad norm", ".3g"),
    ("learning_rate", "lr", ".2e"),
    ("tokens_per_second", "tokens/s", ".0f"),
    ("memory_gib", "GiB", ".2f"),
)
"""Metrics on the line of a log: name, label, format. Everything that is logged is in metrics.jsonl."""


@functools.cache
def console() -> Console:
    """The terminal, or plain text of any width where there is none; one, so that lines are printed above a bar."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=10_000, soft_wrap=True)


def show(rows: Mapping[str, str], title: str = "", out: Console | None = None) -> None:
    """Print labelled lines."""
    out = out or console()
    if title:
        out.print(f"[bold]{escape(title)}[/bold]")
    width = max(map(len, rows), default=0)
    for label, text in rows.items():
        for i, part in enumerate(text.split("\n")):
            out.print(f"  [dim]{escape('' if i else label):<{width}}[/dim]  {escape(part)}")


def track(done: Iterable[int], total: int, label: str) -> None:
    """Run an iterator of counts to its end under a progress bar, where there is a terminal."""
    out = console()
    columns = (
        TextColumn(label),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows"),
        TimeElapsedColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, TimeRemainingColumn(), console=out, disable=not out.is_terminal) as bar:
        task = bar.add_task("", total=total)
        for count in done:
            bar.update(task, completed=count)


class _Printed(logging.Handler):
    """Messages of this package, without decoration."""

    def emit(self, record: logging.LogRecord) -> None:
        console().print(escape(f"  {record.getMessage()}"))


def listen() -> None:
    """Show what the modules of this package report while they work."""
    logger = logging.getLogger("posttrain")
    if not logger.handlers:
        logger.addHandler(_Printed())
        logger.setLevel(logging.INFO)
        logger.propagate = False


def line(logs: Mapping[str, Any], prefix: str = "") -> str:
    """The metrics of one log on a line; `prefix` is `eval_` for an evaluation."""
    cells = [f"{label} {float(logs[prefix + name]):{form}}" for name, label, form in COLUMNS if prefix + name in logs]
    return "  ".join(cells)


class ProgressLines(TrainerCallback):
    """A bar with the time left, and a line per log above it; lines alone where there is no terminal or train.disable_tqdm."""

    def __init__(self, out: Console | None = None) -> None:
        self.console = out or console()
        self.bar: Progress | None = None
        self.task: Any = None
        self.began = (0.0, 0)

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar, at the step a resumed run is at."""
        self.began = (time.perf_counter(), state.global_step)
        if not state.is_world_process_zero or args.disable_tqdm or not self.console.is_terminal:
            return
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeElapsedColumn(), TextColumn("left"))
        self.bar = Progress(*columns, TimeRemainingColumn(), console=self.console)
        self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step)
        self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance."""
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Mapping[str, Any], **kwargs: Any) -> None:
        """The line of a log; the summary at the end is left to the closing message."""
        if not state.is_world_process_zero or not ("loss" in logs or "eval_loss" in logs):
            return
        prefix = "" if "loss" in logs else "eval_"
        where = f"step {state.global_step}/{state.max_steps}"
        left = "" if prefix or self.bar is not None else f"  {self._left(state)} left"
        self.console.print(escape(f"{where}  {'eval  ' if prefix else ''}{line(logs, prefix)}{left}"))

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _left(self, state: Any) -> str:
        since, at = self.began
        seconds = (time.perf_counter() - since) / max(state.global_step - at, 1) * (state.max_steps - state.global_step)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}"
