"""How long a command takes until it answers: help, check, and the first training step; ours beside TRL's.

    python -m benchmarks.launch --model <folder> --data pairs.jsonl [--rounds 3]

Seconds from the start of the command to its end; for training, to the line that reports the first step, which stops it. The two
take turns; the table gives medians. Both train on the first rows of the data, one a step, so that nearly all is start-up.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

from .machine import stamp

_ROWS = 64
"""Rows of data that both read."""

_FIRST_STEP = re.compile(r"^step 1/|'loss':")
"""The line that reports a step, of ours or of transformers'."""


def commands(options: argparse.Namespace, folder: str) -> dict[str, dict[str, list[str]]]:
    """What is asked -> side -> command."""
    ours, trl = [sys.executable, "-m", "posttrain"], [sys.executable, "-m", "trl.cli.main"]
    of = ["--model", options.model, "--data", f"{folder}/data", "--data.max_length", str(options.max_length)]
    of += ["--data.format", "plain"]
    return {
        "help": {"ours": [*ours, "--help"], "trl": [*trl, "--help"]},
        "dpo --help": {"ours": [*ours, "dpo", "--help"], "trl": [*trl, "dpo", "--help"]},
        "check": {"ours": [*ours, "check", "--objective.name", "dpo", *of]},
        "first step": {
            "ours": [
                *ours, "dpo", *of, "--train.output_dir", f"{folder}/ours", "--train.max_steps", "50",
                "--train.per_device_train_batch_size", "1", "--train.logging_steps", "1", "--train.use_cpu", "true",
            ],
            "trl": [
                *trl, "dpo", "--model_name_or_path", options.model, "--dataset_name", f"{folder}/data",
                "--max_length", str(options.max_length), "--output_dir", f"{folder}/trl", "--max_steps", "50",
                "--per_device_train_batch_size", "1", "--gradient_checkpointing", "false", "--logging_steps", "1",
                "--use_cpu", "true", "--bf16", "false", "--report_to", "none",
            ],
        },
    }  # fmt: skip


def seconds(command: list[str], until: re.Pattern | None) -> float:
    """Until a command has ended, or has printed a line that matches, after which it is stopped.

    Raises:
        SystemExit: it failed, or ended without such a line; its last words.
    """
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    said = []
    for line in process.stdout:
        said.append(line)
        if until is not None and until.search(line):
            took = time.perf_counter() - start
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return took
    if process.wait() or until is not None:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{''.join(said[-20:])}")
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--asked", nargs="+", help="only these rows of the table")
    parser.add_argument("--json", help="also write every number to this file")
    options = parser.parse_args()
    print(f"{stamp('trl')}; medians of {options.rounds}\n")
    print("| command | posttrain | TRL | ratio |\n|---|---|---|---|")
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "data", "train.jsonl")
        rows.parent.mkdir()
        with open(options.data, encoding="utf-8") as lines:
            rows.write_text("".join(islice(lines, _ROWS)), encoding="utf-8")
        for asked, sides in commands(options, folder).items():
            if options.asked and asked not in options.asked:
                continue
            took = found[asked] = {side: [] for side in sides}
            for _ in range(options.rounds):
                for side, command in sides.items():
                    took[side].append(seconds(command, _FIRST_STEP if asked == "first step" else None))
            ours, trl = (statistics.median(took[side]) if side in took else None for side in ("ours", "trl"))
            print(f"| {asked} | {ours:.2f} | " + ("| |" if trl is None else f"{trl:.2f} | {ours / trl:.2f} |"), flush=True)
    print(json.dumps(found))
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
