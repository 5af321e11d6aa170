"""Runs with teachers that are asked once learn what they would learn beside the teacher itself, and say what is missing."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from serving import serving
from test_teacher_server import Served
from tiny_models import saved
from transformers import AutoModelForCausalLM

from posttrain.cli import main
from posttrain.recipe import load_run
from posttrain.records import read_metrics
from posttrain.run import Prepared, execute, prepare
from posttrain.schema import UserError
from posttrain.teacher_cache import CachedTeacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, a teacher of another width and with spare rows, and 12 rows of data."""
    folder = tmp_path_factory.mktemp("pair")
    saved(folder / "student", rows=3)
    saved(folder / "teacher", rows=5, hidden_size=48, num_hidden_layers=3, seed=1)
    lines = [{"prompt": f"ab {i}?", "completion": f"yes {i}" + " no" * (i % 3)} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[Served]:
    with serving(Served(AutoModelForCausalLM.from_pretrained(folder / "teacher"))) as served:
        yield served


def settings(folder: Path, out: Path, *changes: str) -> list[str]:
    return [
        f"model={folder / 'student'}",
        f"data={folder / 'rows.jsonl'}",
        "data.max_length=60",
        "top=8",
        f"teacher.cache={out / 'cache'}",
        f"train.output_dir={out / 'out'}",
        "train.max_steps=3",
        "train.per_device_train_batch_size=4",
        "train.logging_steps=1",
        "train.learning_rate=3e-3",
        "train.warmup_steps=0",
        "train.save_strategy=no",
        "data.eval_size=4",
        *changes,
    ]


def run(folder: Path, out: Path, *changes: str, go: Any = execute) -> Prepared:
    return go(load_run("kd", None, settings(folder, out, *changes)))


def live(folder: Path, out: Path, *changes: str, go: Any = execute) -> Prepared:
    """A run beside the teacher itself."""
    given = [one for one in settings(folder, out, *changes) if not one.startswith("teacher.cache")]
    return go(load_run("kd", None, given))


def invoke(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def losses(prepared: Prepared) -> list[float]:
    lines = read_metrics(Path(prepared.args.output_dir))
    return [line[name] for line in lines for name in ("loss", "eval_loss", "nll/teacher") if name in line]


def gradients(prepared: Prepared, reverse: bool = False, layout: str = "tree") -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of six rows."""
    trainer, rows = prepared.trainer, list(prepared.data.train)[:6]
    trainer.data_collator.layout = layout
    batch = trainer.data_collator(rows[::-1] if reverse else rows)
    batch |= trainer.scalars([batch])
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def close(one: tuple[float, dict[str, torch.Tensor]], other: tuple[float, dict[str, torch.Tensor]]) -> bool:
    (value, mine), (expected, theirs) = one, other
    assert mine.keys() == theirs.keys() and mine
    largest = max(grad.abs().max() for grad in theirs.values())
    apart = max((mine[name] - theirs[name]).abs().max() for name in mine)
    return abs(value - expected) < 1e-6 and bool(apart < 1e-5 * largest)


@pytest.mark.parametrize(
    "changes", [[], ["divergence=reverse_kl", "temperature=2", "ce_weight=0.5"], ["tail=teacher_renormalised"]]
)
def test_cached_equals_live_in_loss_and_gradient(folder: Path, tmp_path: Path, changes: list[str]) -> None:
    """In any order of rows and either layout; the teacher's and the student's spare rows are cut alike."""
    changes = [f"teacher={folder / 'teacher'}", *changes]
    beside = gradients(live(folder, tmp_path, *changes, go=prepare))
    cached = run(folder, tmp_path, *changes, "teacher.kind=cached", go=prepare)
    assert isinstance(cached.trainer.reference, CachedTeacher) and len(cached.trainer.reference) == 12
    assert close(gradients(cached), beside)
    assert close(gradients(cached, reverse=True), beside)
    assert close(gradients(cached, layout="separate"), beside)


def test_runs_beside_disk_server_and_teacher_are_the_same(folder: Path, tmp_path: Path, server: Served) -> None:
    teacher = f"teacher={folder / 'teacher'}"
    expected = losses(live(folder, tmp_path / "live", teacher))
    cached = run(folder, tmp_path / "cached", teacher, "teacher.kind=cached")
    assert len(expected) == 8 and losses(cached) == pytest.approx(expected, abs=1e-5)
    served = run(folder, tmp_path / "served", "teacher.kind=served", f"teacher.url={server.url}/v1")
    assert losses(served) == pytest.approx(expected, abs=1e-5)
    assert "cached 8 likeliest items of big" in served.trainer.reference.description
    asked = server.completions()
    server.shutdown()
    server.server_close()
    gone = ["teacher=big", "teacher.kind=served", f"teacher.url={server.url}", f"train.output_dir={tmp_path / 'again'}"]
    again = run(folder, tmp_path / "served", *gone)
    assert losses(again)[:3] == losses(served)[:3] and asked == server.completions() == 12


def test_a_method_with_parameters_of_its_own_reads_it_too(folder: Path, tmp_path: Path) -> None:
    found = []
    for name, kind in (("live", "model"), ("kept", "cached")):
        words = settings(folder, tmp_path / name, f"teacher={folder / 'teacher'}", f"teacher.kind={kind}")
        drop = ("top=", "teacher.cache=") if kind == "model" else ("top=",)
        found.append(losses(execute(load_run("dackl", None, [*(one for one in words if not one.startswith(drop)), "k=8"]))))
    assert len(found[0]) > 3 and found[1] == pytest.approx(found[0], abs=1e-5)


def test_the_student_with_its_adapter_off(folder: Path, tmp_path: Path) -> None:
    done = run(folder, tmp_path, "teacher.kind=cached", "model.peft={r: 4}", "train.max_steps=1")
    assert losses(done)[0] == pytest.approx(0.0, abs=1e-6)
    assert (
        isinstance(done.trainer.reference, CachedTeacher)
        and "policy with its adapter off" in done.trainer.reference.description
    )


def test_logps_asks_once(folder: Path, tmp_path: Path) -> None:
    teacher = (f"teacher={folder / 'teacher'}", "teacher.kind=cached")
    result = invoke("logps", "objective=kd", *settings(folder, tmp_path, *teacher))
    assert result.exit_code == 0, result.output
    shown = " ".join(result.output.split())
    assert "cached 8 likeliest items of" in shown and "of the probability, on average" in shown and "completions 12" in shown
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    run(folder, tmp_path, *teacher, "train.learning_rate=1e-4", go=prepare)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")} and before


@pytest.mark.multi
def test_two_processes_ask_for_half_each(folder: Path, tmp_path: Path) -> None:
    teacher = (f"teacher={folder / 'teacher'}", "teacher.kind=cached")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "posttrain",
        "logps",
    ]
    words = ["objective=kd", *settings(folder, tmp_path / "two", *teacher)]
    got = subprocess.run([*launch, *words], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert got.returncode == 0, got.stderr[-4000:]
    assert "completions 12" in " ".join(got.stdout.split())
    written = sorted((tmp_path / "two" / "cache").rglob("*.safetensors"))
    both = run(folder, tmp_path / "two", *teacher, go=prepare).trainer.reference
    one = run(folder, tmp_path / "one", *teacher, go=prepare)
    assert len(written) == 2 and sorted((tmp_path / "two" / "cache").rglob("*.safetensors")) == written and len(both) == 12
    for row in (row for part in (one.data.train, one.data.eval) for row in part):
        mine, theirs = (cache.lookup(row["prompt"], row["completion"][0]) for cache in (both, one.trainer.reference))
        assert (mine["top_ids"] == theirs["top_ids"]).all()
        assert abs(mine["top_reference_logps"] - theirs["top_reference_logps"]).max() < 2e-6


def test_check_says_who_is_asked_and_asks_nobody(folder: Path, tmp_path: Path) -> None:
    for words, said in [
        ([f"teacher={folder / 'teacher'}", "teacher.kind=cached"], f"teacher cached: {folder / 'teacher'}"),
        (["teacher.kind=served", "teacher.url=http://127.0.0.1:9"], "teacher the model served at http://127.0.0.1:9"),
    ]:
        result = invoke("check", "objective=kd", *settings(folder, tmp_path, *words))
        assert result.exit_code == 0, result.output
        assert said in " ".join(result.output.split()) and "teachers 0" not in result.output
    assert not (tmp_path / "cache").exists()


def test_damage_and_absence_are_named(folder: Path, tmp_path: Path) -> None:
    changes = (f"teacher={folder / 'teacher'}", "teacher.kind=cached")
    prepared = run(folder, tmp_path, *changes, go=prepare)
    with pytest.raises(UserError, match="lacks a completion of 2 tokens; `posttrain logps` with this recipe adds"):
        prepared.trainer.data_collator([{"prompt": [5], "completion": [[6, 7]]}])
    (path,) = (tmp_path / "cache").rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    result = invoke("logps", "objective=kd", *settings(folder, tmp_path, *changes))
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert f"{path} is damaged" in result.stderr and "delete it, and `posttrain logps` asks for its part again" in result.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            "teacher.kind=cached teacher=x top=null",
            "teacher: kind = cached keeps a teacher's likeliest items, kd reads its whole distribution; give top, the "
            "number of items (--top 64)",
        ),
        (
            "teacher.kind=served teacher.url=http://h temperature=2",
            "teacher: kind = served gives log-probs at temperature 1, kd reads them at 2; use temperature 1, or kind = cached",
        ),
        ("teacher.kind=served teacher=x", "teacher: kind = served needs teacher.url"),
        ("teacher.kind=cached", "teacher: model is required by kd"),
        ("teacher.kind=cached teacher=[x,y]", "teacher: kind = cached takes one teacher, and model names 2"),
        (
            "teacher.kind=cached teacher=x teacher.url=http://h",
            "teacher.url is for kind = served and would be ignored by cached",
        ),
        (
            "teacher.kind=served teacher.url=http://h teacher.dtype=bfloat16",
            "teacher.dtype is for kind = model and cached and would be ignored by served",
        ),
        ("teacher=x", "teacher.cache is for kind = cached and served and would be ignored by auto"),
        ("teacher.kind=cached teacher=x rollouts.student=0.5", "teacher: kind = cached is asked of the data before training"),
        ("teacher.kind=cached teacher=x data.streaming=true", "teacher: kind = cached needs rows that can be read twice"),
    ],
)
def test_refused(folder: Path, tmp_path: Path, changes: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        run(folder, tmp_path, *changes.split(), go=prepare)
    assert str(error.value).startswith(message)


def test_sharded_training_needs_a_full_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = dataclasses.make_dataclass("State", ["distributed_type"])("FSDP")
    state.wait_for_everyone = lambda: None
    monkeypatch.setattr("posttrain.teacher_fill.PartialState", lambda: state)
    with pytest.raises(UserError, match=r"^teacher: rows are missing in \S+; run `posttrain logps` before sharded training"):
        run(folder, tmp_path, f"teacher={folder / 'teacher'}", "teacher.kind=cached", go=prepare)
