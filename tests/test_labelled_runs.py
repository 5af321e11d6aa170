"""Whole runs on labelled rows: held-out rows, cached reference, streams, and what is said about the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import saved

from posttrain.recipe import load_run
from posttrain.records import read_metrics
from posttrain.run import Prepared, execute, prepare
from posttrain.schema import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and 12 labelled rows, 8 of them desirable."""
    folder = saved(tmp_path_factory.mktemp("labelled"), max_position_embeddings=64)
    written = [{"prompt": f"{'a' * i}?", "completion": f"so {i}" * (1 + i % 3), "label": i % 3 > 0} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    return folder


def run(folder: Path, out: Path, *changes: str, go: Any = execute) -> Prepared:
    given = [
        f"model={folder}",
        f"data={folder / 'rows.jsonl'}",
        "data.max_length=64",
        f"train.output_dir={out}",
        "train.max_steps=3",
        "train.logging_steps=1",
        "train.learning_rate=1e-2",
        "train.per_device_train_batch_size=2",
        "train.save_strategy=no",
    ]
    return go(load_run("kto", None, [*given, *changes]))


def metrics(out: Path) -> list[dict[str, float]]:
    """What was logged, but for clocks, memory and the epoch, which transformers counts in micro-batches."""
    measured = ("per_second", "memory_gib", "time", "seconds", "epoch")
    return [{k: v for k, v in line.items() if not any(word in k for word in measured)} for line in read_metrics(out)]


def test_held_out_loss_does_not_depend_on_its_batches(folder: Path, tmp_path: Path) -> None:
    """z0 is one number over the held-out rows, and another one than that of a training step."""
    for size in (1, 4):
        run(folder, tmp_path / str(size), "data.eval_size=4", f"train.per_device_eval_batch_size={size}")
    one, four = (metrics(tmp_path / str(size)) for size in (1, 4))
    evaluated = [line for line in one if "eval_loss" in line]
    assert evaluated and evaluated[-1]["eval_kl/z0_raw"] != 0
    for ours, theirs in zip(one, four, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_a_short_last_step_is_the_same_however_it_is_split(folder: Path, tmp_path: Path) -> None:
    """12 rows, 5 a step: the last has 2."""
    for size in (5, 1):
        split = (f"train.per_device_train_batch_size={size}", f"train.gradient_accumulation_steps={5 // size}")
        run(folder, tmp_path / str(size), "train.max_steps=-1", "train.warmup_steps=0", *split)
    whole, single = ([line for line in metrics(tmp_path / str(size)) if "loss" in line] for size in (5, 1))
    assert len(whole) == 3
    assert whole[2]["count/desirable/sum"] + whole[2].get("count/undesirable/sum", 0) == 2
    for ours, theirs in zip(whole, single, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_cached_reference_covers_what_is_borrowed(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "frozen")
    prepared = run(folder, tmp_path / "cached", "reference=cached", f"reference.cache={tmp_path / 'cache'}")
    assert len(prepared.trainer.reference) == 24
    for ours, theirs in zip(metrics(tmp_path / "cached"), metrics(tmp_path / "frozen"), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    estimates = [line["kl/z0_raw"] for line in metrics(tmp_path / "cached") if "loss" in line]
    assert estimates[:2] == pytest.approx([0, 0], abs=1e-4) and abs(estimates[2]) > 0.01  # the first learning rate is 0


def test_a_stream_trains(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "out", "data.streaming=true")
    assert [line["step"] for line in metrics(tmp_path / "out") if "loss" in line] == [1, 2, 3]


def test_unequal_classes_are_named_with_the_setting_that_helps(folder: Path, tmp_path: Path) -> None:
    advised = "kto: 8 desirable rows of weight 1, 4 undesirable ones of weight 1: a ratio of 2, advised is 1 to 1.5; "
    report = run(folder, tmp_path / "one", go=prepare).data.report
    assert report.warnings == [advised + "--undesirable_weight 1.6 makes it 1.25"]
    assert run(folder, tmp_path / "two", "undesirable_weight=1.6", go=prepare).data.report.warnings == []


def test_one_prompt_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "why?", "completion": f"so {i}", "label": i}) + "\n" for i in range(2)))
    with pytest.raises(UserError, match=r"^data: all 2 rows have the same prompt"):
        run(folder, tmp_path / "out", f"data={path}", go=prepare)
