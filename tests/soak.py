"""A small run killed at random moments, each time continued by the same command: `python tests/soak.py --kills 200`.

Every attempt is a process of its own, forked from one that has the libraries imported, so that it dies as any process does
under SIGKILL and starts in a moment. When it dies is drawn in seconds of processor time, which are the same work however busy
the machine is. What is left at the end must be what an uninterrupted run leaves, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file
from tiny_models import saved

import posttrain.run
from posttrain.checkpoints import MANIFEST, checkpoints, newest, step_of
from posttrain.cli import main as posttrain
from posttrain.records import read_metrics

STEPS = 40
SHARE = 0.6
"""Of the processor time of a whole run: the latest moment of a kill."""


@dataclass(frozen=True)
class Outcome:
    """What a soak did."""

    kills: int
    """Attempts ended by SIGKILL."""

    finished: int
    """Attempts that came to the end; each is followed by a new run, as long as there are kills left."""

    further: int
    """Kills after the attempt had completed a checkpoint."""

    halves: int
    """Kills that left a checkpoint half-written, or half-removed."""


def prepare(folder: Path) -> list[str]:
    """Model and data in `folder`; the words of a run over them that saves often."""
    saved(folder / "model")
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


def attempt(words: list[str], output: Path, seconds: float | None) -> tuple[int, float]:
    """Run in a new process, killed after so many seconds of processor time; its exit status (-9: killed), and its seconds."""
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
    process, spent = psutil.Process(child), 0.0
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), spent
        spent = sum(process.cpu_times()[:2])
        if seconds is not None and spent >= seconds:
            os.kill(child, signal.SIGKILL)
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
    status, length = attempt(words, folder / "whole", None)
    assert status == 0
    draw = random.Random(seed)
    done, finished, further, halves, reached = 0, 0, 0, 0, 0
    while done < kills or not finished:
        output = folder / f"killed-{finished}"
        status, _ = attempt(words, output, draw.uniform(0, SHARE * length) if done < kills else None)
        if status == -signal.SIGKILL:
            done += 1
            halves += any(not (one / MANIFEST).is_file() for one in checkpoints(output))
            before, reached = reached, step_of(newest(output) or output) or 0
            further += reached > before
            continue
        assert status == 0, f"exit status {status} after {done} kills"
        compare(folder / "whole", output)
        finished, reached = finished + 1, 0
    return Outcome(done, finished, further, halves)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        outcome = soak(Path(scratch), options.kills, options.seed)
    print(f"{outcome.kills} kills, {outcome.finished} finished runs equal to the uninterrupted one")
    print(f"{outcome.further} kills after a new checkpoint, {outcome.halves} with one half-written or half-removed")
