"""Rollouts inside the training step: who writes, what is learned from, and that splits and interruptions change nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import settings_of, train
from tiny_models import saved

from posttrain.engines.hf import HFEngine
from posttrain.engines.rollout import derived
from posttrain.online import OnlineTrainer, _number
from posttrain.recipe import load_run
from posttrain.run import Prepared, prepare
from posttrain.schema import UserError
from posttrain.trees import Collator, TreeCollator, prompts_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, a teacher of another width, and instructions."""
    root = tmp_path_factory.mktemp("online")
    saved(root / "student")
    saved(root / "teacher", hidden_size=48)
    rows = [{"prompt": f"ab {i}?", "completion": f"yes {i}"} for i in range(8)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def run(folder: Path, output: Path, *more: str, teacher: str = "teacher") -> Prepared:
    beside = [f"teacher={folder / teacher}"] if teacher else []
    return prepare(load_run("kd", None, settings_of(folder, output, *beside, *more, model="student")))


def losses(prepared: Prepared) -> list[float]:
    return [line["loss"] for line in prepared.trainer.state.log_history if "loss" in line]


def batch_of(trainer: OnlineTrainer, count: int = 3) -> dict[str, torch.Tensor]:
    return trainer.data_collator([trainer.train_dataset[i] for i in range(count)])


@pytest.mark.parametrize("layout", ["tree", "separate"])
def test_the_prompts_of_a_batch(layout: Any) -> None:
    rows = [{"prompt": [i] * (i + 1), "completion": [[7, 8]]} for i in range(1, 6)]
    batch = Collator(TreeCollator(["completion"], layout=layout), None)(rows)
    assert sorted(prompts_of(batch)) == [row["prompt"] for row in rows]


def test_who_writes_is_drawn_by_step(folder: Path, tmp_path: Path) -> None:
    trainer = run(folder, tmp_path, "rollouts.student=0.5", "rollouts.teacher=0.25").trainer
    writers = [trainer.writer(step) for step in range(400)]
    assert writers == [trainer.writer(step) for step in range(400)]
    shares = {name: writers.count(name) / 400 for name in ("student", "teacher", "data")}
    assert shares == pytest.approx({"student": 0.5, "teacher": 0.25, "data": 0.25}, abs=0.07)


@pytest.mark.parametrize("writer", ["student", "teacher"])
def test_what_is_learned_from_is_what_its_writer_samples(folder: Path, tmp_path: Path, writer: str) -> None:
    prepared = run(folder, tmp_path, f"rollouts.{writer}=1")
    trainer = prepared.trainer
    trainer.model_wrapped = trainer.model
    batch = batch_of(trainer)
    (got,) = trainer.learned_from([batch])
    model = trainer.model if writer == "student" else trainer.reference.members[0].model
    prompts = prompts_of(batch)
    engine = HFEngine(model, prepared.run.sampling, ends=trainer.ends, pad=trainer.pad)
    rollouts = engine.generate(prompts, seeds=[derived(0, 0, _number(prompt)) for prompt in prompts])
    assert prompts_of(got) == prompts or sorted(prompts_of(got)) == sorted(prompts)
    assert got["targets"].tolist() == [token for rollout in rollouts for token in rollout.completion]
    assert got["targets"].tolist() != batch["targets"].tolist()


def test_a_correction_puts_the_teacher_in_at_the_worst_token(folder: Path, tmp_path: Path) -> None:
    prepared = run(folder, tmp_path, "rollouts.student=1", "rollouts.corrections=1", "sampling.stop_at_eos=false")
    trainer = prepared.trainer
    trainer.model_wrapped = trainer.model
    trainer.ends = ()
    (prompt,) = prompts_of(batch_of(trainer, 1))
    completion = [5, 9, 6, 9, 5, 8]
    (got,) = trainer._corrected([prompt], [completion], [1])

    def logps(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)

    lp, lq = logps(trainer.model), logps(trainer.reference.members[0].model)
    kl = (lq.exp() * (lq - lp)).sum(-1)
    differs = lq.argmax(-1) != torch.tensor(completion)
    worst = int(kl.masked_fill(~differs, -1).argmax())
    assert got[:worst] == completion[:worst] and got[worst] == int(lq[worst].argmax()) and len(got) == 6


def test_splits_and_interruptions_change_nothing(folder: Path, tmp_path: Path) -> None:
    def trained(name: str, *more: str, resume: str | None = None) -> Prepared:
        return train(run(folder, tmp_path / name, "rollouts.student=1", "train.save_steps=1", *more), resume)

    whole = trained("whole")
    split = trained("split", "train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=2")
    assert losses(split) == pytest.approx(losses(whole), rel=1e-5)
    resumed = trained("whole", resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    logged = whole.trainer.state.log_history[0]
    assert logged["rollouts/student"] == 1 and 1 <= logged["rollouts/length"] <= 6 and 0 <= logged["rollouts/ended"] <= 1


def test_the_student_without_its_adapter_writes(folder: Path, tmp_path: Path) -> None:
    peft = ["model.peft={r: 4, init_lora_weights: false}", "teacher.kind=adapter", "rollouts.teacher=1"]
    prepared = run(folder, tmp_path, *peft, teacher="")
    trainer = prepared.trainer
    trainer.model_wrapped = trainer.model
    batch = batch_of(trainer)
    (got,) = trainer.learned_from([batch])
    prompts = prompts_of(batch)
    with trainer.model.disable_adapter():
        engine = HFEngine(trainer.model, prepared.run.sampling, ends=trainer.ends, pad=trainer.pad)
        rollouts = engine.generate(prompts, seeds=[derived(0, 0, _number(prompt)) for prompt in prompts])
    assert got["targets"].tolist() == [token for rollout in rollouts for token in rollout.completion]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["rollouts.student=0.7", "rollouts.teacher=0.7"], "student 0.7 and teacher 0.7 are shares of the steps"),
        (["rollouts.corrections=1"], "corrections are of the student's completions"),
        (["rollouts.student=2"], "rollouts: student = 2"),
        (["rollouts.student=1", "engine.kind=file", "engine.path=x"], "kind = file holds completions sampled before"),
    ],
)
def test_mistakes(folder: Path, tmp_path: Path, words: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        run(folder, tmp_path, *words)


def test_only_where_something_is_sampled(folder: Path) -> None:
    base = [f"model={folder / 'student'}", f"data={folder / 'rows.jsonl'}"]
    with pytest.raises(UserError, match="rollouts: dpo compares completions of the data"):
        load_run("dpo", None, [*base, "rollouts.student=1"])
    with pytest.raises(UserError, match="engine, sampling: nothing is sampled"):
        load_run("dpo", None, [*base, "sampling.temperature=0.5"])
