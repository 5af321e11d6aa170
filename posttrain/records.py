"""What a run leaves in its output folder beside the model: the resolved run (JSON) and its metrics (JSON lines).

The resolved run says whose checkpoints a folder holds, so that no run continues or overwrites another's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from .recipe import Run
from .replacing import replacing

RUN = "run.json"
METRICS = "metrics.jsonl"

IDENTITY = ("objective", "model", "data", "reference", "teacher", "rollouts", "reward", "sampling", "layout")
"""The sections of a run that make it another run. Those left (train, engine, imports) may differ when one is continued."""


def difference(run: Run, folder: Path, sections: Sequence[str] = IDENTITY) -> str:
    """The first setting in which `run` differs from the run that wrote `folder`; empty where there is none."""
    path = folder / RUN
    if not path.is_file():
        return f"it has no {RUN}, so posttrain did not write it"
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return f"{path} is damaged ({error})"
    ours = json.loads(json.dumps(run.resolved()))
    for section in sections:
        if found := first_difference(theirs.get(section), ours[section], section):
            return found
    return ""


def first_difference(theirs: Any, ours: Any, key: str) -> str:
    """The first setting in which two runs differ, and how; empty where there is none. `key` is what they are settings of."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        names = sorted({*theirs, *ours}, key=lambda name: name != "name")
        return next(filter(None, (first_difference(theirs.get(name), ours.get(name), f"{key}.{name}") for name in names)), "")
    return "" if theirs == ours else f"{key} is {theirs!r} there and {ours!r} here"


class Records(TrainerCallback):
    """Writes the resolved run into the output folder and every checkpoint, and each log as a line of metrics."""

    def __init__(self, run: Run) -> None:
        self.text = json.dumps(run.resolved(), indent=2) + "\n"

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the metrics of the steps that a resumed run has behind it, and only those."""
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        self._write(folder)
        path = folder / METRICS
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() and state.global_step else []
        kept = [line for line in lines if _precedes(line, state.global_step)]
        with replacing(path) as partial:
            partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Mapping[str, Any], **kwargs: Any) -> None:
        """One line: the step, the epoch, and what was logged."""
        if not state.is_world_process_zero:
            return
        values = {"step": state.global_step, "epoch": state.epoch, **logs}
        line = {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}
        with Path(args.output_dir, METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """The resolved run goes into the checkpoint."""
        if state.is_world_process_zero:
            self._write(Path(args.output_dir, f"checkpoint-{state.global_step}"))

    def _write(self, folder: Path) -> None:
        with replacing(folder / RUN) as partial:
            partial.write_text(self.text, encoding="utf-8")


def _precedes(line: str, step: int) -> bool:
    """Whether a line of metrics belongs to the steps up to `step`: a cut line and the summary of an earlier end do not."""
    try:
        values = json.loads(line)
    except ValueError:
        return False
    return values["step"] <= step and "train_runtime" not in values


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The logs of a run, in order."""
    path = Path(folder) / METRICS
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
