"""Distillation from the command line: who teaches, what is refused, and that a student of another width learns."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from exactness import compile_communication
from tiny import tiny_tokenizer
from tiny_models import saved, tiny

from posttrain.cli import main
from posttrain.data import load
from posttrain.recipe import load_run
from posttrain.records import read_metrics
from posttrain.run import Prepared, execute
from posttrain.settings import DataConfig


def invoke(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("teacher"), hidden_size=48, num_hidden_layers=3, seed=1)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = [{"instruction": f"ab {i}?", "context": "a b" * (i % 2), "response": f"yes {i}"} for i in range(12)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def small(student: Path, teacher: Path, rows: Path, tmp_path: Path) -> list[str]:
    """The settings of a run of 4 steps."""
    return [
        f"model={student}",
        f"teacher={teacher}",
        f"data={rows}",
        f"train.output_dir={tmp_path / 'out'}",
        "train.max_steps=4",
        "train.per_device_train_batch_size=4",
        "train.logging_steps=1",
        "train.learning_rate=3e-3",
        "train.warmup_steps=0",
        "train.save_strategy=no",
        "data.eval_size=4",
    ]


def run(settings: list[str], name: str = "kd") -> Prepared:
    return execute(load_run(name, overrides=settings))


def losses(prepared: Prepared) -> list[float]:
    return [line["loss"] for line in read_metrics(Path(prepared.args.output_dir)) if "loss" in line]


def test_a_student_of_another_width_learns(small: list[str], teacher: Path) -> None:
    done = run([*small, "train.max_steps=12", "data.max_length=200"])
    found = losses(done)
    assert found[-1] < 0.7 * found[0]
    logged = read_metrics(Path(done.args.output_dir))
    assert (
        logged[0]["divergence/forward_kl"] == pytest.approx(found[0]) and "nll/teacher" in logged[0] and "kl" not in logged[0]
    )
    assert [line["eval_loss"] for line in logged if "eval_loss" in line][-1] < found[0]
    taught_by = done.trainer.reference.models[0]
    assert not any(p.requires_grad for p in taught_by.parameters()) and not taught_by.training
    trained = {id(p) for group in done.trainer.optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in taught_by.parameters()}
    fresh = tiny("llama", vocab_size=len(done.tokenizer), hidden_size=48, num_hidden_layers=3, seed=1)
    assert torch.equal(taught_by.lm_head.weight, fresh.lm_head.weight)
    folder = Path(done.args.output_dir)
    assert f"| teacher | {teacher} |" in (folder / "README.md").read_text()
    assert json.loads((folder / "run.json").read_text())["teacher"]["model"][0]["name"] == str(teacher)


def test_check_shows_teacher_vocabulary_and_memory(small: list[str], teacher: Path) -> None:
    result = invoke("check", "objective=kd", *small)
    assert result.exit_code == 0, result.output
    shown = " ".join(result.output.split())
    assert f"teacher {teacher}" in shown
    tokens = len(tiny_tokenizer())
    assert f"{tokens} tokens in common" in shown
    assert "teachers 0.00 GiB" in shown
    assert "ab 0? a" not in shown and "yes 0" in shown


def test_several_teachers_give_the_weighted_mean(small: list[str], teacher: Path, student: Path, tmp_path: Path) -> None:
    other = saved(tmp_path / "other", hidden_size=64, seed=2)
    small = [*small, "train.max_steps=1", "train.per_device_train_batch_size=8"]
    alone = [run([*small, f"teacher={who}", f"train.output_dir={tmp_path / str(i)}"]) for i, who in enumerate((teacher, other))]
    apart = [losses(done)[0] for done in alone]
    both = run([*small, f"teacher=[{{name: {teacher}, weight: 3}}, {other}]"])
    assert losses(both)[0] == pytest.approx(0.75 * apart[0] + 0.25 * apart[1], abs=1e-5)
    logged = read_metrics(Path(both.args.output_dir))[0]
    assert [logged[f"divergence/forward_kl/teacher{i}"] for i in (1, 2)] == pytest.approx(apart, abs=1e-5)
    assert both.trainer.reference.description == f"frozen model {teacher} (75%), frozen model {other} (25%)"


def test_self_distillation_starts_at_0(small: list[str]) -> None:
    settings = [one for one in small if not one.startswith("teacher=")]
    done = run([*settings, "teacher.kind=adapter", "model.peft={r: 4}", "ce_weight=0", "train.max_steps=1"])
    assert losses(done) == [pytest.approx(0.0, abs=1e-7)]
    assert done.trainer.reference.description == "the policy with its adapter off"


@pytest.mark.parametrize(
    ("objective", "settings", "message"),
    [
        ("kd", ["teacher=null"], "teacher: model is required by kd: a hub id or folder (--teacher X); or kind = adapter"),
        ("kd", ["reference=frozen"], "reference: kd compares with a teacher; give teacher in place of reference"),
        ("kd", ["teacher.kind=adapter"], "teacher: model is the student itself where kind = adapter"),
        ("kd", ["teacher.kind=adapter", "teacher.model=null"], "teacher: kind = adapter needs an adapter to switch off"),
        ("kd", ["teacher=./nowhere"], "teacher.model.name: folder ./nowhere does not exist"),
        ("kd", ["teacher.modle=x"], "teacher: unknown key 'modle'; did you mean model?"),
        ("dpo", [], "teacher: dpo has no teacher; leave the section out"),
    ],
)
def test_refused(small: list[str], objective: str, settings: list[str], message: str) -> None:
    result = invoke(objective, *small, *settings)
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert message in result.stderr


# Vocabularies


def test_padded_heads_are_cut_to_the_real_tokens(small: list[str], tmp_path: Path) -> None:
    """Rows beyond the tokenizer's tokens: the loss is that between the real ones, and what is dropped is logged."""
    wide = saved(tmp_path / "student", rows=5)
    teacher = saved(tmp_path / "teacher", rows=40, hidden_size=48, seed=1)
    done = run([*small, f"model={wide}", f"teacher={teacher}", "train.max_steps=1", "train.per_device_train_batch_size=8"])
    size = len(done.tokenizer)
    assert done.trainer.reference.size == size
    rows = [done.data.train[i] for i in range(8)]
    values, spare = [], {"student": [], "teacher": []}
    models = {"student": tiny("llama", vocab_size=size + 5), "teacher": taught_by(done)}
    with torch.no_grad():
        for row in rows:
            ids, at = torch.tensor([[*row["prompt"], *row["completion"][0]]]), len(row["prompt"]) - 1
            logits = {who: model(input_ids=ids).logits[0, at:-1] for who, model in models.items()}
            lp, lq = (logits[who][:, :size].log_softmax(-1) for who in logits)
            values += (lq.exp() * (lq - lp)).sum(-1).tolist()
            for who, z in logits.items():
                spare[who] += z.softmax(-1)[:, size:].sum(-1).tolist()
    mean = lambda numbers: sum(numbers) / len(numbers)  # noqa: E731
    logged = read_metrics(Path(done.args.output_dir))[0]
    assert logged["loss"] == pytest.approx(mean(values), abs=1e-5)
    for who, numbers in spare.items():
        assert logged[f"dropped/{who}"] == pytest.approx(mean(numbers), rel=1e-3)


def taught_by(done: Prepared) -> torch.nn.Module:
    return done.trainer.reference.models[0]


def test_equal_heads_drop_nothing_and_say_nothing(small: list[str]) -> None:
    assert not any("dropped" in name for name in read_metrics(Path(run([*small, "train.max_steps=1"]).args.output_dir))[0])


def test_another_tokenizer_is_refused(small: list[str], tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    other = saved(tmp_path / "other")
    written = json.loads((other / "tokenizer.json").read_text())
    written["model"]["vocab"] = vocabulary
    (other / "tokenizer.json").write_text(json.dumps(written))
    for command in ("kd", "check"):
        settings = small if command == "kd" else ["objective=kd", *small]
        result = invoke(command, *settings, f"teacher={other}")
        assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
        assert f"teacher: {other} has another tokenizer than" in result.stderr
        assert f"2 of {len(tokenizer)} ids stand for other tokens" in result.stderr and "id by id" in result.stderr


def test_tokens_that_only_the_student_has(small: list[str], student: Path, tmp_path: Path) -> None:
    """They are cut where the data has none of them, and refused where it has."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    wide = saved(tmp_path / "student", tokenizer)
    done = run([*small, f"model={wide}", "train.max_steps=1"])
    assert done.trainer.reference.size == len(tokenizer) - 1
    assert "dropped/student" in read_metrics(Path(done.args.output_dir))[0]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "ab?", "completion": f"{i} <new>"}) + "\n" for i in range(8)))
    result = invoke("kd", *small, f"model={wide}", f"data={path}", f"train.output_dir={tmp_path / 'new'}")
    assert result.exit_code == 2 and f"has token {len(tokenizer) - 1}" in result.stderr


@pytest.mark.multi
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
def test_a_teacher_in_pieces(small: list[str], tmp_path: Path) -> None:
    """Two processes under ZeRO-3, which cuts student and teacher, make the same steps as one process."""
    small = [*small, "train.max_steps=2", "train.optim=adamw_torch", "data.eval_size=0"]
    alone, apart = tmp_path / "alone", tmp_path / "apart"
    run([*small, "train.per_device_train_batch_size=4", f"train.output_dir={alone}"])
    words = [*small, "train.per_device_train_batch_size=2", f"train.output_dir={apart}"]
    words += ["--launch", "zero3", "--processes", "2"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    compile_communication(environment)
    command = [sys.executable, "-m", "posttrain", "kd", *words]
    got = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert got.returncode == 0, got.stderr[-3000:]
    found = [[line["loss"] for line in read_metrics(folder) if "loss" in line] for folder in (alone, apart)]
    assert found[0] == pytest.approx(found[1], abs=1e-5)


# Rows of one completion


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"prompt": "ab?", "completion": "yes"}, "<|im_start|>user\nab?<|im_end|>", "yes<|im_end|>"),
        ({"instruction": "ab", "context": "a b", "response": "no"}, "<|im_start|>user\nab\n\na b<|im_end|>", "no<|im_end|>"),
        ({"instruction": "ab", "input": "", "output": "no"}, "<|im_start|>user\nab<|im_end|>", "no<|im_end|>"),
        ({"question": "a?", "answer": "b"}, "<|im_start|>user\na?<|im_end|>", "b<|im_end|>"),
        (
            {"messages": [turn("user", "a"), turn("assistant", "b"), turn("user", "ab"), turn("assistant", "no")]},
            "<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nab<|im_end|>",
            "no<|im_end|>",
        ),
    ],
    ids=["prompt", "dolly", "alpaca", "question", "messages"],
)
def test_rows_of_one_completion(row: dict[str, object], prompt: str, completion: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    example = load(DataConfig(name=str(path)), tiny_tokenizer(), ["completion"]).report.train[0].example
    assert example["prompt"].endswith(f"{prompt}\n<|im_start|>assistant\n")
    assert example["completion"] == completion
