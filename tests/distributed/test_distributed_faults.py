"""Processes that go wrong, die or are told to stop: real ones, two of them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file
from soak import compare, prepare

from posttrain.checkpoints import MANIFEST, newest
from posttrain.shipped import launch_config

pytestmark = pytest.mark.multi

WITHIN = 60
"""Seconds in which the others end when a process dies: they notice, and after 30 torch's launcher kills what does not."""

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """A small run; see soak.py."""
    words = [word for word in prepare(tmp_path) if not word.startswith(("reference.", "train.use_cpu"))]
    return [sys.executable, "-m", "posttrain", *words, "train.optim=adamw_torch", f"train.output_dir={tmp_path / 'out'}"]


def environment() -> dict[str, str]:
    """Of a process that finds the modules of the tests."""
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """To its end."""
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=600)


def started(command: list[str], out: Path) -> subprocess.Popen[str]:
    """A run that has logged its first step."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment())
    while not (out / "metrics.jsonl").is_file() or not (out / "metrics.jsonl").read_text():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    return process


def two(engine: str) -> list[str]:
    """The words that start two processes."""
    return ["--launch", engine, "--processes", "2"]


@pytest.mark.parametrize("engine", ["ddp", pytest.param("zero2", marks=[pytest.mark.slow, needs_deepspeed])])
def test_not_finite_on_one_process_ends_both(command: list[str], tmp_path: Path, engine: str) -> None:
    at = command.index("bco")
    spoiled = [*command[:at], "train", "imports=[spoiled]", "objective=spoiled", "objective.rank=1", *command[at + 1 :]]
    done = run([*spoiled, "train.max_steps=4", *two(engine)])
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert done.stderr.count("step 3: the loss is not finite; the batch is in") == 1
    (saved,) = (tmp_path / "out" / "nonfinite-step-3").iterdir()
    assert saved.name == "process-1.safetensors" and {"0/targets", "1/targets"} <= load_file(saved).keys()


def test_one_dies_and_the_other_ends(command: list[str], tmp_path: Path) -> None:
    process = started([*command, "train.max_steps=100000", *two("ddp")], tmp_path / "out")
    workers = [child for child in psutil.Process(process.pid).children(recursive=True) if child.environ().get("RANK") == "1"]
    workers[0].kill()
    since = time.monotonic()
    _, errors = process.communicate(timeout=WITHIN)
    assert process.returncode not in (0, None) and time.monotonic() - since < WITHIN, errors
    assert not psutil.pid_exists(workers[0].pid)


def test_told_to_stop_both_save_and_the_same_command_continues(command: list[str], tmp_path: Path) -> None:
    whole = [*command[:-1], f"train.output_dir={tmp_path / 'whole'}", *two("ddp")]
    assert run(whole).returncode == 0
    again = [*command, *two("ddp")]
    process = started(again, tmp_path / "out")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=WITHIN)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert newest(tmp_path / "out") is not None and not (tmp_path / "out" / "model.safetensors").exists()
    assert run(again).returncode == 0
    compare(tmp_path / "whole", tmp_path / "out")


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
@pytest.mark.parametrize("objective", ["bco", "sparsepo"])
def test_shards_resume_bitwise(command: list[str], tmp_path: Path, engine: str, objective: str) -> None:
    """Optimizer shards, BCO's running mean, SparsePO's own parameters: what is written at step 4 is what step 5 reads."""
    command[command.index("bco")] = objective
    asked = [*command, "train.max_steps=8", "train.save_steps=4", *two(engine)]
    out, kept = tmp_path / "out", tmp_path / "kept"
    done = run(asked)
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.copytree(out, kept)
    (out / "checkpoint-8" / MANIFEST).unlink()
    again = run(asked)
    assert again.returncode == 0 and f"continued from {out / 'checkpoint-4'}" in again.stdout, again.stderr[-3000:]
    compare(kept, out)


@pytest.mark.slow
def test_another_number_of_processes_continues_with_a_word(command: list[str], tmp_path: Path) -> None:
    """Of DDP, whose checkpoints are whole; DeepSpeed's shards are refused (test_checkpoints.py)."""
    asked, out = [*command, "train.max_steps=4"], tmp_path / "out"
    assert run([*asked, *two("ddp")]).returncode == 0
    (out / "checkpoint-4" / MANIFEST).unlink()
    done = run(asked)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "checkpoint-2 was written by 2 processes and is continued by 1" in done.stdout + done.stderr


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def node(rank: int, port: int) -> list[str]:
    """The command of README.md on one of two machines, each with a process."""
    machines = ["--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank)]
    address = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    return [*launch, str(launch_config("ddp")), *machines, *address, "-m", "posttrain"]


def torchrun(rank: int, port: int) -> list[str]:
    """The same by torchrun."""
    found = ["--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(rank), "--master-addr", "127.0.0.1"]
    return [sys.executable, "-m", "torch.distributed.run", *found, "--master-port", str(port), "-m", "posttrain"]


@pytest.mark.parametrize("launcher", [node, torchrun])
def test_two_machines(command: list[str], tmp_path: Path, launcher: Callable[[int, int], list[str]]) -> None:
    """Each starts its own process, and they train together."""
    port, words = free_port(), [*command[3:], "train.max_steps=2"]
    machines = [
        subprocess.Popen(
            [*launcher(rank, port), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
        )
        for rank in (0, 1)
    ]
    (said, errors), (silent, _) = [machine.communicate(timeout=600) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], errors
    assert "2 rows x 2 accumulated x 2 processes = 8 rows a step" in said and "step 1/2" not in silent
    assert (tmp_path / "out" / "model.safetensors").is_file()
