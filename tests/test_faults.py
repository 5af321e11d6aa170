"""What is not finite, and disks that take no more: on one process."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import SafetensorError
from safetensors.torch import load_file
from soak import prepare

from posttrain.checkpoints import checkpoints, defect, newest
from posttrain.cli import main
from posttrain.faults import refused, writing
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


def alone(words: list[str], before: Callable[[], None]) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, in which `before` is called first."""
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command, environment = [sys.executable, "-m", "posttrain", *words], {**os.environ, "PYTHONPATH": paths}
    return subprocess.run(command, capture_output=True, text=True, env=environment, preexec_fn=before)


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


@pytest.mark.parametrize(("folder", "reason"), [("{tmp}/file/out", "Not a directory"), ("/sys/out", ""), ("/proc/out", "")])
def test_a_folder_that_cannot_be_made(words: list[str], tmp_path: Path, folder: str, reason: str) -> None:
    """Before anything is read; what the kernel says of /sys and /proc depends on how they are mounted."""
    (tmp_path / "file").write_text("text")
    folder = folder.format(tmp=tmp_path)
    result = invoke([*words, f"train.output_dir={folder}"])
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and line.startswith(
        f"posttrain: error: train.output_dir: {folder} cannot be written: {reason}"
    )
    assert not line.endswith(": ") and (tmp_path / "file").read_text() == "text"


@pytest.mark.parametrize(
    ("command", "output", "reason"),
    [("sample", "file/x.jsonl", "{tmp}/file: File exists"), ("eval", "file/out", "Not a directory")],
)
def test_samples_that_cannot_be_written(words: list[str], tmp_path: Path, command: str, output: str, reason: str) -> None:
    (tmp_path / "file").write_text("text")
    given = [word for word in words if word.startswith(("model=", "data"))]
    more = ["reward=length"] if command == "eval" else []
    result = invoke([command, *given, *more, "max_new_tokens=2", f"output={tmp_path / output}"])
    says = f"posttrain: error: output: {tmp_path / output} cannot be written: {reason.format(tmp=tmp_path)}; what was complete"
    assert result.exit_code == 2 and result.stderr.splitlines()[-1].startswith(says)


def test_files_elsewhere_are_not_the_output(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError), writing(tmp_path / "runs" / "out"):
        (Path(__file__) / "rows.jsonl").read_text()


def bind_root() -> None:
    """Permissions bind root as they bind everybody, from the next program on; others have nothing to give up."""
    drop_from_bounding_set, override_permissions = 24, 1
    ctypes.CDLL(None).prctl(drop_from_bounding_set, override_permissions, 0, 0, 0)


@pytest.mark.multi
@pytest.mark.parametrize("locked", [False, True])
def test_a_folder_that_was_made_read_only(words: list[str], tmp_path: Path, locked: bool) -> None:
    """Its checkpoints are as they were; once it may be written to, the same command continues."""
    out, again = tmp_path / "out", [*words, "objective.at=9", "train.resume_from_checkpoint=true"]
    assert invoke([*words, "objective.at=9", "train.max_steps=2"]).exit_code == 0
    folders = [out, *(path for path in out.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    (out / ".lock").chmod(0o444 if locked else 0o644)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    got = alone(again, bind_root)
    assert got.returncode == 2 and "Traceback" not in got.stderr, got.stderr
    assert f"posttrain: error: train.output_dir: {out} cannot be written: Permission denied" in got.stderr
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    for folder in folders:
        folder.chmod(0o755)
    (out / ".lock").chmod(0o644)
    assert newest(out) == out / "checkpoint-2" and defect(out / "checkpoint-2") == ""
    assert invoke(again).exit_code == 0 and newest(out) == out / "checkpoint-4"


@pytest.mark.multi
@pytest.mark.parametrize("limit", [2_000, 60_000, 200_000])
def test_a_checkpoint_that_does_not_fit_costs_nothing(words: list[str], tmp_path: Path, limit: int) -> None:
    """Files may be no larger than so many bytes, as on a disk that fills up: one line, and the last checkpoint is whole."""
    out, again = tmp_path / "out", [*words, "objective.at=9", "train.resume_from_checkpoint=true"]
    assert invoke([*words, "objective.at=9", "train.max_steps=2"]).exit_code == 0
    full = alone(again, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert full.returncode == 2 and "cannot be written" in full.stderr and "Traceback" not in full.stderr, full.stderr
    assert newest(out) == out / "checkpoint-2" and defect(out / "checkpoint-2") == ""
    assert invoke(again).exit_code == 0
    assert [folder.name for folder in checkpoints(out)] == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]
