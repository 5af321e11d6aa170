"""A small run killed at random moments, each time continued by the same command: `python tests/soak.py --kills 200`.

Every attempt is a process of its own, forked from one that has the libraries imported, so that it dies as any process does
under SIGKILL and starts in a moment. What is left at the end must be what an uninterrupted run leaves, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny import tiny_tokenizer
from tiny_models import tiny

from posttrain.cli import main as posttrain
from posttrain.records import read_metrics

STEPS = 40


@dataclass(frozen=True)
class Outcome:
    """What a soak did."""

    kills: int
    """Attempts ended by SIGKILL."""

    finished: int
    """Attempts that came to the end; each is followed by a new run, as long as there are kills left."""

    resumed_at: list[int]
    """Number of complete checkpoints each killed attempt left."""


def prepare(folder: Path) -> list[str]:
    """Model and data in `folder`; the words of a run over them that saves often."""
    tokenizer = tiny_tokenizer()
    tiny("llama", vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": f"ab {i}?", "chosen": f"yes {i}", "rejected": f"no {i} ab"} for i in range(24)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": folder / "model",
        "data": folder / "pairs.jsonl",
        "data.max_length": 200,
        "reference.kind": "cached",
        "reference.cache": folder / "cache",
        "train.max_steps": STEPS,
        "train.save_steps": 2,
        "train.logging_steps": 3,
        "train.learning_rate": 1e-3,
        "train.per_device_train_batch_size": 2,
        "train.gradient_accumulation_steps": 2,
        "train.use_cpu": "true",
    }
    return ["bco", *(f"{key}={value}" for key, value in settings.items())]


def attempt(words: list[str], output: Path, seconds: float | None) -> int:
    """Run in a new process, killed after so many seconds if it is still there; its exit status (-9: killed)."""
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            posttrain([*words, f"train.output_dir={output}"])
        except SystemExit as done:
            os._exit(done.code if isinstance(done.code, int) else 0)
        os._exit(70)
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            deadline = None
        time.sleep(0.002)


def compare(whole: Path, killed: Path) -> None:
    """The final models and the metrics of two runs are the same; every logged step is there once."""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (whole, killed))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours), "the weights differ"

    def told(folder: Path) -> list[dict]:
        lines = [line for line in read_metrics(folder) if "loss" in line]
        return [{key: line[key] for key in line if key not in ("tokens_per_second", "memory_gib")} for line in lines]

    assert told(whole) == told(killed), "the metrics differ"


def soak(folder: Path, kills: int, seed: int = 0) -> Outcome:
    """Kill until there were `kills`, then let the run end; compares every finished run with an uninterrupted one.

    Raises:
        AssertionError: something was lost, or differs.
    """
    words = prepare(folder)
    start = time.monotonic()
    assert attempt(words, folder / "whole", None) == 0
    length = time.monotonic() - start
    draw = random.Random(seed)
    done, finished, left = 0, 0, []
    while done < kills or not finished:
        output = folder / f"killed-{finished}"
        status = attempt(words, output, draw.uniform(0, 0.6 * length) if done < kills else None)
        if status == -signal.SIGKILL:
            done += 1
            left.append(len(list(output.glob("checkpoint-*/manifest.json"))))
            continue
        assert status == 0, f"exit status {status} after {done} kills"
        compare(folder / "whole", output)
        finished += 1
    return Outcome(done, finished, left)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        outcome = soak(Path(scratch), options.kills, options.seed)
    spread = {number: outcome.resumed_at.count(number) for number in sorted(set(outcome.resumed_at))}
    print(f"{outcome.kills} kills, {outcome.finished} finished runs equal to the uninterrupted one; checkpoints left: {spread}")
    sys.exit(0)
