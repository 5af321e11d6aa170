"""Checkpoints: whole or not there, one run in a folder, a stop on request, and real processes killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from soak import compare, prepare
from transformers import TrainerControl, TrainerState, TrainingArguments

from posttrain.checkpoints import (
    MANIFEST,
    Checkpoints,
    checkpoints,
    defect,
    newest,
    occupy,
    refuse_other_processes,
    write_manifest,
)
from posttrain.schema import UserError


def folder_of(output: Path, step: int, text: str = "weights") -> Path:
    folder = output / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text(text)
    write_manifest(folder, processes=1)
    return folder


def test_the_newest_complete_one_by_step_whatever_the_clock_says(tmp_path: Path) -> None:
    first, second, third = (folder_of(tmp_path, step) for step in (5, 20, 100))
    os.utime(first, (2e9, 2e9))
    assert checkpoints(tmp_path) == [first, second, third] and newest(tmp_path) == third
    (third / MANIFEST).unlink()
    assert newest(tmp_path) == second and "not written to its end" in defect(third)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda f: (f / "model.safetensors").write_text("weight"), "model.safetensors has 6 bytes, not 7"),
        (lambda f: (f / "model.safetensors").write_text("WEIGHTS"), "model.safetensors is damaged (checksum)"),
        (lambda f: (f / MANIFEST).write_text('{"files": '), "its manifest is damaged"),
    ],
)
def test_what_is_damaged_is_not_complete(tmp_path: Path, damage, says: str) -> None:
    folder = folder_of(tmp_path, 1)
    assert defect(folder) == ""
    damage(folder)
    assert says in defect(folder) and newest(tmp_path) is None


def callback(keep: int | None, processes: int = 1) -> Checkpoints:
    return Checkpoints(keep, SimpleNamespace(num_processes=processes, wait_for_everyone=lambda: None))


def test_old_ones_go_after_the_new_one_is_complete_and_the_best_stays(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    for step in (2, 4, 6):
        folder_of(tmp_path, step)
    (tmp_path / "checkpoint-8").mkdir()
    (tmp_path / "checkpoint-8" / "model.safetensors").write_text("new")
    state = TrainerState(global_step=8, best_model_checkpoint=str(tmp_path / "checkpoint-2"))
    callback(2).on_save(args, state, TrainerControl())
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-6", "checkpoint-8"]
    assert not any(defect(folder) for folder in checkpoints(tmp_path))


def test_what_is_half_written_goes_when_training_begins(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    whole = folder_of(tmp_path, 2)
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-of-mine").mkdir()
    one = callback(None)
    one.on_train_begin(args, TrainerState(), TrainerControl())
    one.on_train_end(args, TrainerState(), TrainerControl())
    assert checkpoints(tmp_path) == [whole] and (tmp_path / "checkpoint-of-mine").is_dir()


def test_a_folder_has_one_run_at_a_time(tmp_path: Path) -> None:
    lock = occupy(tmp_path / "out")
    with pytest.raises(UserError, match="another run is writing into"):
        occupy(tmp_path / "out")
    lock.release()
    occupy(tmp_path / "out").release()


def test_shards_fit_only_the_processes_that_wrote_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    folder = folder_of(tmp_path, 1)
    refuse_other_processes(folder, args)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"processes": 2}))
    refuse_other_processes(folder, args)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="holds the shards of 2 processes, this run has 1"):
        refuse_other_processes(folder, args)


@pytest.mark.multi
def test_killed_at_random_moments_nothing_is_lost(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("soak.py")), "--kills", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "8 kills, " in done.stdout


@pytest.mark.multi
def test_told_to_stop_it_saves_and_says_so(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "posttrain", *prepare(tmp_path)]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert subprocess.run([*words, f"train.output_dir={whole}"], capture_output=True).returncode == 0
    again = [*words, f"train.output_dir={stopped}"]
    process = subprocess.Popen(again, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not (stopped / "metrics.jsonl").is_file() or not (stopped / "metrics.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143 and "posttrain: stopped at step" in errors, errors
    assert newest(stopped) is not None and not (stopped / "model.safetensors").exists()
    assert subprocess.run(again, capture_output=True).returncode == 0
    compare(whole, stopped)
