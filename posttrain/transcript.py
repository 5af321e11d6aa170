"""What the models wrote in a round: `rollouts.jsonl` in the output folder, a line a prompt for people to read; and its metrics.

The file is always that of a run which was never interrupted: a run that continues first removes the lines of rounds that it
samples again, and a line that was cut off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from .engines.rollout import Rollout
from .replacing import replacing
from .rewards.scorer import Scored
from .rounds import Asked

FILE = "rollouts.jsonl"


class Transcript(TrainerCallback):
    """Writes the file; the first process does.

    Args:
        output: the output folder of the run.
    """

    def __init__(self, output: Path) -> None:
        self.path = output / FILE

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the rounds that were sampled before the step that training continues from."""
        if not state.is_world_process_zero:
            return
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.is_file() and state.global_step else []
        kept = [line for line in lines if _step(line) < state.global_step]
        with replacing(self.path) as partial:
            partial.write_bytes(b"".join(kept))

    def add(self, lines: Sequence[dict[str, Any]]) -> None:
        """Add the lines of a round; they are on the disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())


def _step(line: bytes) -> float:
    """The step of a line; infinite for one that is not whole."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")


def read_transcript(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a run, in order."""
    path = Path(folder) / FILE
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.is_file() else []


def lines(
    asked: Sequence[Asked],
    rollouts: Sequence[Rollout],
    texts: Sequence[str],
    scored: Scored,
    keep: Sequence[bool],
    *,
    step: int,
    decode: Callable[[Sequence[int]], str],
) -> list[dict[str, Any]]:
    """A line for each prompt of a round on this process.

    Args:
        asked: the prompts.
        rollouts, texts, scored, keep: of their completions, prompt after prompt.
        step: optimizer steps that were done when they were sampled.
        decode: from tokens to text.
    """
    found, group = [], len(rollouts) // max(len(asked), 1)
    for at, one in enumerate(asked):
        mine = slice(at * group, (at + 1) * group)
        line = {"step": step, "place": one.place, "prompt": decode(one.ids), "completions": texts[mine]}
        line |= {"rewards": scored.total[mine], "scores": {name: values[mine] for name, values in scored.parts.items()}}
        line |= {} if scored.heldout is None else {"heldout": scored.heldout[mine]}
        found.append(line | {"finished": [one.finished for one in rollouts[mine]], "learned_from": keep[mine]})
    return found


def rollout_metrics(rollouts: Sequence[Rollout], group: int, keep: Tensor) -> dict[str, Tensor]:
    """What a round is like: lengths, shares that came to an end and that are learned from, versions, repetition."""
    numbers = {
        "rollouts/length": [len(one.completion) for one in rollouts],
        "rollouts/finished": [one.finished for one in rollouts],
        "rollouts/kept": keep.tolist(),
        "rollouts/version": [one.version for one in rollouts],
        "rollouts/distinct_2": distinct([one.completion for one in rollouts], group),
    }
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in numbers.items()}


def reward_metrics(scored: Scored) -> dict[str, Tensor]:
    """Mean and standard deviation of what is learned from, of each scorer, and of the one that is only logged."""
    sides = {"reward": scored.total} | {f"reward/{name}": values for name, values in scored.parts.items()}
    sides |= {} if scored.heldout is None else {"reward/heldout": scored.heldout}
    values = {name: torch.tensor(side, dtype=torch.float64) for name, side in sides.items()}
    return values | {f"{name}/std": value for name, value in values.items()}


def distinct(completions: Sequence[Sequence[int]], group: int, n: int = 2) -> list[float]:
    """For each group of completions the share of different ones among all their n-grams of tokens: 1 repeats nothing."""
    found = []
    for start in range(0, len(completions), group):
        grams = [tuple(one[at : at + n]) for one in completions[start : start + group] for at in range(len(one) - n + 1)]
        found.append(len(set(grams)) / len(grams) if grams else 1.0)
    return found
