"""What is not finite, and disks that take no more: on one process."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import SafetensorError
from safetensors.torch import load_file
from soak import prepare

from posttrain.checkpoints import checkpoints, defect, newest
from posttrain.cli import main
from posttrain.faults import refused
from posttrain.records import read_metrics

STEPS = 4


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A run of 4 steps that saves each, and goes wrong after the second."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    _, *rest = prepare(tmp_path)
    ours = ["reference.kind=frozen", f"train.max_steps={STEPS}", "train.save_steps=1", "train.logging_steps=1"]
    ours += [f"train.output_dir={tmp_path / 'out'}", "train.save_total_limit=9", "train.weight_decay=0.1"]
    return ["train", "imports=[spoiled]", "objective=spoiled", *(word for word in rest if "reference.cache" not in word), *ours]


def invoke(words: list[str]) -> Result:
    return CliRunner().invoke(main, words)


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(out / f"checkpoint-{step}" / "model.safetensors")


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_stop(words: list[str], tmp_path: Path, what: str) -> None:
    result = invoke([*words, f"objective.what={what}"])
    out = tmp_path / "out"
    (line,) = result.stderr.splitlines()[-1:]
    assert result.exit_code == 2 and line.startswith(
        f"posttrain: error: step 3: the {what} is not finite; the batch is in {out}"
    )
    saved = load_file(out / "nonfinite-step-3" / "process-0.safetensors")
    assert {"0/input_ids", "0/targets", "0/lengths.chosen", "1/context.progress"} <= saved.keys()
    assert newest(out) == out / "checkpoint-2" and all(tensor.isfinite().all() for tensor in weights(out, 2).values())


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_skip(words: list[str], tmp_path: Path, what: str) -> None:
    """The step changes nothing, not even by weight decay or momentum, and those after it go on."""
    result = invoke([*words, f"objective.what={what}", "nonfinite=skip"])
    assert result.exit_code == 0, result.output
    assert f"step 3 is left out: its {what} is not finite" in result.stdout
    second, third, fourth = (weights(tmp_path / "out", step) for step in (2, 3, 4))
    assert all(torch.equal(second[name], third[name]) for name in second)
    assert not all(torch.equal(third[name], fourth[name]) for name in third)
    assert all(tensor.isfinite().all() for tensor in fourth.values())


def test_go_on(words: list[str], tmp_path: Path) -> None:
    result = invoke([*words, "nonfinite=go_on"])
    assert result.exit_code == 0, result.output
    losses = [line["loss"] for line in read_metrics(tmp_path / "out") if "loss" in line]
    assert losses[2] == "nan" and not all(tensor.isfinite().all() for tensor in weights(tmp_path / "out", 4).values())


def test_possible_choices(words: list[str]) -> None:
    result = invoke([*words, "nonfinite=ignore"])
    assert result.exit_code == 2 and "nonfinite = 'ignore'; possible: stop, skip, go_on" in result.stderr


def test_what_a_disk_says() -> None:
    assert refused(OSError(errno.ENOSPC, "No space left on device")) == "No space left on device"
    assert refused(OSError(errno.EROFS, "Read-only file system")) == "Read-only file system"
    assert refused(SafetensorError("Error while serializing: I/O error: File too large (os error 27)")) == "File too large"
    assert refused(RuntimeError("PytorchStreamWriter failed writing file data/0")) == "the disk takes no more"
    others = (OSError(errno.ECONNRESET, "reset"), SafetensorError("header"), RuntimeError("shapes differ"))
    assert [refused(error) for error in others] == [None] * 3


@pytest.mark.multi
@pytest.mark.parametrize("limit", [2_000, 60_000, 200_000])
def test_a_checkpoint_that_does_not_fit_costs_nothing(words: list[str], tmp_path: Path, limit: int) -> None:
    """Files may be no larger than so many bytes, as on a disk that fills up: one line, and the last checkpoint is whole."""
    out, command = tmp_path / "out", [sys.executable, "-m", "posttrain", *words, "objective.at=9"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    first = subprocess.run([*command, "train.max_steps=2"], capture_output=True, text=True, env=environment)
    assert first.returncode == 0, first.stderr
    again = [*command, "train.max_steps=4", "train.resume_from_checkpoint=true"]
    full = subprocess.run(
        again,
        capture_output=True,
        text=True,
        env=environment,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert full.returncode == 2 and "cannot be written" in full.stderr and "Traceback" not in full.stderr, full.stderr
    assert newest(out) == out / "checkpoint-2" and defect(out / "checkpoint-2") == ""
    done = subprocess.run(again, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert [folder.name for folder in checkpoints(out)] == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]
