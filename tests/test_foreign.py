"""A teacher with another tokenizer: its reading of the rows, the pairing of tokens, and a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_tokenizer
from tiny_models import saved

from posttrain.foreign import Retold, aligned
from posttrain.recipe import load_run
from posttrain.records import read_metrics
from posttrain.run import execute
from posttrain.schema import UserError
from posttrain.trees import TreeCollator

STUDENT, TEACHER = tiny_tokenizer(), tiny_tokenizer(chat=False, reverse=True)


def retold(longest: int | None = None) -> Retold:
    return Retold(STUDENT, TEACHER, longest, TreeCollator(roles=("completion",)))


def test_tokens_of_the_same_number() -> None:
    """Completions of 3, 1 and 2 tokens beside others of 2, 3 and 2: the third of the first has no counterpart."""
    index, paired = aligned(torch.tensor([3, 1, 2]), torch.tensor([2, 3, 2]))
    assert index.tolist() == [0, 1, 1, 2, 5, 6]
    assert paired.tolist() == [1, 1, 0, 1, 1, 1]


def test_the_teacher_reads_the_text_in_its_own_tokens() -> None:
    """Special tokens of the student are left out, its own beginning and end are added."""
    ids = lambda text: STUDENT(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    row = {"prompt": [1, 3, *ids("ab?"), 4], "completion": [[*ids(" yes!"), STUDENT.eos_token_id]]}
    told = retold().row(row)
    assert told["prompt"][0] == TEACHER.bos_token_id and TEACHER.decode(told["prompt"][1:]) == "ab?"
    (completion,) = told["completion"]
    assert completion[-1] == TEACHER.eos_token_id and TEACHER.decode(completion[:-1]) == " yes!"
    assert completion[:-1] != row["completion"][0][:-1]


def test_too_long_a_reading_is_cut() -> None:
    ids = STUDENT("ab? ab? ab?", add_special_tokens=False)["input_ids"]
    told = retold(12).row({"prompt": ids * 3, "completion": [ids[:4]]})
    assert len(told["prompt"]) + len(told["completion"][0]) == 12
    told = retold(6).row({"prompt": ids, "completion": [ids]})
    assert (len(told["prompt"]), len(told["completion"][0])) == (1, 5)


def changes(tmp_path: Path, *more: str) -> list[str]:
    rows = [{"prompt": f"ab {i}?", "completion": " yes" if i % 2 else " no, ab"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    student, teacher = saved(tmp_path / "student", STUDENT), saved(tmp_path / "teacher", TEACHER, hidden_size=48, seed=1)
    return [
        f"model={student}",
        f"teacher={teacher}",
        f"data={tmp_path / 'rows.jsonl'}",
        f"train.output_dir={tmp_path / 'out'}",
        "train.max_steps=2",
        "train.logging_steps=1",
        "train.per_device_train_batch_size=4",
        *more,
    ]


def test_a_run(tmp_path: Path) -> None:
    execute(load_run("uld", overrides=changes(tmp_path)))
    logs = [line for line in read_metrics(tmp_path / "out") if "loss" in line]
    assert len(logs) == 2 and all(0 < line["sorted_l1"] < 2 and 0 < line["paired"] <= 1 for line in logs)


def test_rollouts_of_the_student_are_retold_too(tmp_path: Path) -> None:
    execute(load_run("uld", overrides=changes(tmp_path, "rollouts.student=1", "sampling.max_new_tokens=5")))
    logs = [line for line in read_metrics(tmp_path / "out") if "loss" in line]
    assert all(line["rollouts/student"] == 1 and 0 < line["sorted_l1"] < 2 for line in logs)


def test_it_writes_no_rollouts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^rollouts: a teacher with another tokenizer can neither write nor correct them"):
        execute(load_run("uld", overrides=changes(tmp_path, "rollouts.teacher=0.5")))


def test_what_compares_id_by_id_refuses_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has another tokenizer than .*; kd compares probabilities id by id; uld accepts"):
        execute(load_run("kd", overrides=changes(tmp_path)))
