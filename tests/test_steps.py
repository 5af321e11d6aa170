"""Rounds of rollouts inside the training step: what is learned from; splits, processes and interruptions change nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import settings_of, train
from tiny_models import saved

from posttrain import docs, memory
from posttrain.check import check
from posttrain.loading import Plan
from posttrain.precompute import precompute
from posttrain.recipe import load_run
from posttrain.records import read_metrics
from posttrain.registry import find
from posttrain.run import Prepared, export, prepare
from posttrain.schema import UserError
from posttrain.settings import OF_DISTILLATION
from posttrain.steps import StepTrainer
from posttrain.transcript import distinct, read_transcript

PROMPTS = 8
TIMED = ("tokens_per_second", "memory_gib")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and prompts with a further column."""
    root = tmp_path_factory.mktemp("steps")
    saved(root / "model")
    rows = [{"prompt": f"ab {i}?", "bonus": i} for i in range(PROMPTS)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def words_of(folder: Path, output: Path, *more: str) -> list[str]:
    """The settings that the tests share."""
    ours = ["imports=[sampled]", "objective.name=sampled", "reward=sampled:spread", "rollouts.group_size=3"]
    return settings_of(folder, output, *ours, *more)


def run(folder: Path, output: Path, *more: str) -> Prepared:
    return prepare(load_run(None, None, words_of(folder, output, *more)))


def trained(folder: Path, output: Path, *more: str, resume: str | None = None) -> Prepared:
    return train(run(folder, output, *more), resume)


def logs(prepared: Prepared) -> list[dict[str, Any]]:
    """What was logged at each step, but for the times."""
    return [
        {key: value for key, value in line.items() if key not in TIMED}
        for line in prepared.trainer.state.log_history
        if "loss" in line
    ]


def test_a_round_is_sampled_scored_and_learned_from(folder: Path, tmp_path: Path) -> None:
    prepared = trained(folder, tmp_path, "beta=0.1", "reward.weight=2", "reward.heldout=length")
    assert isinstance(prepared.trainer, StepTrainer)
    for step, line in enumerate(logs(prepared)):
        assert line["ratio/max"] < 1e-5, "on the policy"
        assert line["rollouts/mismatch/max"] == pytest.approx(1, abs=1e-4)
        assert line["rollouts/version"] == step and line["lesson/all"] == 12
        assert line["reward"] == pytest.approx(2 * line["reward/sampled:spread"])
        assert (line["rollouts/kl"] == pytest.approx(0, abs=1e-5)) is (step == 0)
        assert 1 <= line["rollouts/length"] <= 6 and 0 <= line["rollouts/finished"] <= 1
    written = read_transcript(tmp_path)
    assert [(line["step"], line["place"]) for line in written] == [(step, place) for step in range(3) for place in range(4)]
    for line in written:
        number = int(line["prompt"].split("ab ")[1].split("?")[0])
        expected = [len(set(text)) + number for text in line["completions"]]
        assert line["scores"] == {"sampled:spread": expected} and line["rewards"] == [2 * value for value in expected]
        assert line["heldout"] == [len(text.split()) for text in line["completions"]] and line["learned_from"] == [True] * 3
    mean = sum(value for line in written[:4] for value in line["rewards"]) / 12
    assert logs(prepared)[0]["reward"] == pytest.approx(mean)


def test_how_a_step_is_split_changes_nothing(folder: Path, tmp_path: Path) -> None:
    more = ["beta=0.1", "drop=7", "rollouts.every=2", "data.limit=7", "train.max_steps=4"]
    whole = trained(folder, tmp_path / "whole", *more)
    sizes = ["train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=2"]
    split = trained(folder, tmp_path / "split", *more, *sizes)
    assert read_transcript(tmp_path / "split") == read_transcript(tmp_path / "whole")
    for one, other in zip(logs(split), logs(whole), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    kept = [line["rollouts/kept"] for line in logs(whole) if "rollouts/kept" in line]
    assert len(kept) == 2 and all(0 < share < 1 for share in kept), "two rounds of two steps, with completions left out"


def test_an_interrupted_run_goes_on_in_the_middle_of_its_round(folder: Path, tmp_path: Path) -> None:
    """Two steps a round, learned from twice; the checkpoint after the third step holds the rest of the first round."""
    more = ["beta=0.1", "rollouts.every=2", "rollouts.epochs=2", "train.max_steps=6", "train.save_steps=1"]
    more += ["train.per_device_train_batch_size=2", "train.save_total_limit=9"]
    whole = trained(folder, tmp_path, *more)
    first, lines = logs(whole), (tmp_path / "rollouts.jsonl").read_bytes()
    held = {path.parent.name for path in tmp_path.glob("checkpoint-*/round-0.safetensors")}
    assert held == {f"checkpoint-{step}" for step in (1, 2, 3, 5, 6)}
    (tmp_path / "rollouts.jsonl").write_bytes(lines + b'{"step": 4, "cut o')
    resumed = trained(folder, tmp_path, *more, resume=str(tmp_path / "checkpoint-3"))
    assert logs(resumed) == first
    assert (tmp_path / "rollouts.jsonl").read_bytes() == lines
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    apart = [line["ratio/max"] for line in first]
    assert apart[0] < 1e-5 < min(apart[1:4]) and apart[4] < 1e-5, "on the policy only before the first update"
    (tmp_path / "checkpoint-3" / "round-0.safetensors").unlink()
    with pytest.raises(UserError, match="step 3 is in the middle of a round of rollouts"):
        trained(folder, tmp_path, *more, resume=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("words", [[], ["rollouts.every=2", "rollouts.epochs=2"]])
def test_a_run_that_was_killed_after_its_last_step_takes_no_other(folder: Path, tmp_path: Path, words: list[str]) -> None:
    more = [*words, "train.max_steps=1", "train.save_steps=1"]
    whole = trained(folder, tmp_path, *more)
    again = trained(folder, tmp_path, *more, resume=str(tmp_path / "checkpoint-1"))
    assert again.trainer.state.global_step == 1 and len(read_transcript(tmp_path)) == 4 * (2 if words else 1)
    pairs = zip(whole.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_scorer_that_raises_loses_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sampled

    whole = trained(folder, tmp_path / "whole")
    monkeypatch.setattr(sampled, "FAILS_AT", 2)
    with pytest.raises(UserError, match=r"reward sampled:spread: row \d+ .*out of order; step 1 is saved"):
        trained(folder, tmp_path / "cut")
    assert (tmp_path / "cut" / "unscored-0.safetensors").is_file()
    monkeypatch.setattr(sampled, "FAILS_AT", None)
    prepared = run(folder, tmp_path / "cut")
    asked = []
    engine = prepared.trainer.engine
    monkeypatch.setattr(prepared.trainer, "engine", lambda: Counted(engine(), asked))
    prepared.trainer.train(resume_from_checkpoint=prepared.checkpoint)
    assert prepared.checkpoint == str(tmp_path / "cut" / "checkpoint-1") and asked == [2], "the round at step 1 was kept"
    assert logs(prepared) == logs(whole)
    assert read_transcript(tmp_path / "cut") == read_transcript(tmp_path / "whole")
    assert not (tmp_path / "cut" / "unscored-0.safetensors").is_file()


class Counted:
    """An engine that says when it samples."""

    def __init__(self, engine: Any, asked: list[int]) -> None:
        self.engine, self.asked = engine, asked

    def sync(self, version: int) -> None:
        self.engine.sync(version)

    def generate(self, *args: Any, **more: Any) -> Any:
        self.asked.append(self.engine.version)
        return self.engine.generate(*args, **more)


def test_prompts_are_held_out_to_evaluate_on(folder: Path, tmp_path: Path) -> None:
    prepared = trained(folder, tmp_path, "data.eval_size=3", "train.eval_strategy=steps", "train.eval_steps=1")
    found = [line for line in prepared.trainer.state.log_history if "eval_reward" in line]
    assert len(found) == 3
    assert all(line["eval_loss"] == pytest.approx(-line["eval_reward"]) and line["eval_length"] >= 1 for line in found)


def test_prompts_of_a_stream(folder: Path, tmp_path: Path) -> None:
    """Five of them twice over: four and one a step."""
    more = ["data.streaming=true", "data.shuffle_buffer=0", "data.limit=5", "train.max_steps=4", "rollouts.every=2"]
    trained(folder, tmp_path, *more)
    asked = [(line["step"], line["place"], line["prompt"].split("ab ")[1][0]) for line in read_transcript(tmp_path)]
    assert asked == [(step, number, str(number)) for step in (0, 2) for number in range(5)]


def test_a_round_of_which_nothing_is_kept(folder: Path, tmp_path: Path) -> None:
    prepared = trained(folder, tmp_path, "drop=1e9", "train.max_steps=1")
    assert logs(prepared)[0]["loss"] == 0 and logs(prepared)[0]["rollouts/kept"] == 0


def test_a_temperature_is_that_of_the_engine_and_of_the_loss(folder: Path, tmp_path: Path) -> None:
    prepared = trained(folder, tmp_path, "sampling.temperature=2.5", "beta=0.1")
    assert all(line["rollouts/mismatch/max"] == pytest.approx(1, abs=1e-4) for line in logs(prepared))
    assert logs(prepared)[0]["rollouts/kl"] == pytest.approx(0, abs=1e-5)


def test_every_prompt_of_an_epoch_is_in_one_step_of_one_round() -> None:
    plan = Plan(batch_size=2, accumulation=3, processes=2, every=2, epochs=2)
    batches = list(plan.batches(range(29)))
    assert len(batches) == 3 * 2 * 3 * 2 and {len(batch) for batch in batches} == {4}
    found = [row for batch in batches for row in batch if row is not None]
    assert sorted(found) == list(range(29))
    first = batches[:6]  # of the first step: three micro-batches for each of two processes, with the second step's rows
    for number, batch in enumerate(first):
        micro, process = divmod(number, 2)
        assert batch == [plan.place(step, micro, process, at) for step in range(2) for at in range(2)]
    assert not any(row is not None for batch in batches[6:24] for row in batch), "the rest of the round"
    left = list(Plan(batch_size=2, accumulation=3, processes=2, every=2, epochs=2, drop_last=True).batches(range(29)))
    assert len(left) == 2 * 2 * 3 * 2 and sum(row is not None for batch in left for row in batch) == 24


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.parametrize(
    "objective",
    [["beta=0.1", "drop=6"], ["objective.name=rlhf", "advantage=gae"], ["objective.name=superhf"]],
    ids=["sampled", "rlhf", "superhf"],
)
def test_two_processes_are_one(folder: Path, tmp_path: Path, objective: list[str]) -> None:
    """Five prompts, two a process and step: in the second step of each epoch one process has none. SGD, because Adam would make
    steps of a whole learning rate of gradients that are nothing but rounding."""
    more = [*objective, "data.limit=5", "train.max_steps=4", "rollouts.every=2", "rollouts.epochs=2"]
    more += ["train.optim=sgd", "train.learning_rate=0.1"]
    export(trained(folder, tmp_path / "one", *more))
    words = words_of(folder, tmp_path / "two", *more, "train.per_device_train_batch_size=2")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "posttrain"]
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    got = subprocess.run([*command, "train", *words], capture_output=True, text=True, env=environment)
    assert got.returncode == 0, got.stderr[-4000:]
    assert read_transcript(tmp_path / "two") == read_transcript(tmp_path / "one")
    ours, theirs = (
        [{name: value for name, value in line.items() if name not in TIMED} for line in read_metrics(path) if "loss" in line]
        for path in (tmp_path / "two", tmp_path / "one")
    )
    assert len(ours) == 4
    for line, other in zip(ours, theirs, strict=True):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-4)
    two, one, start = (load_file(path / "model.safetensors") for path in (tmp_path / "two", tmp_path / "one", folder / "model"))
    apart, moved = (max(float((a[name] - b[name]).abs().max()) for name in b) for a, b in ((two, one), (one, start)))
    assert two.keys() == one.keys() and apart < 1e-5 < 1e-3 < moved


@pytest.mark.parametrize("words", [["advantage=gae", "beta=0.1"], ["advantage=grpo", "kl=loss"]])
def test_policy_optimisation(folder: Path, tmp_path: Path, words: list[str]) -> None:
    """A critic is trained, saved and read back; the exported model is without it."""
    words = ["objective.name=rlhf", *words, "train.save_steps=2", "rollouts.epochs=2"]
    whole = trained(folder, tmp_path, *words)
    first = logs(whole)
    assert first[0]["ratio/max"] == pytest.approx(1, abs=1e-5) and first[0]["kl"] == pytest.approx(0, abs=1e-6)
    resumed = trained(folder, tmp_path, *words, resume=str(tmp_path / "checkpoint-2"))
    assert logs(resumed) == first
    pairs = zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True)
    assert all(name == other and torch.equal(one, two) for (name, one), (other, two) in pairs)
    critic = "objective.value" in dict(whole.model.named_parameters())
    assert critic is ("advantage=gae" in words)
    if critic:
        assert whole.trainer.own.value.abs().max() > 0 and "values/loss" in first[0]
        export(whole)
        assert "objective.value" not in load_file(tmp_path / "model.safetensors")


def test_what_a_run_says_of_itself(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["reward=[{name: length, weight: 0.5}, sampled:spread]", "reward.heldout=length", "rollouts.epochs=2", "beta=0.1"]
    words = words_of(folder, tmp_path, *more, "reference.kind=ema", "train.max_steps=-1", "train.num_train_epochs=3")
    check(load_run(None, None, words))
    shown = " ".join(capsys.readouterr().out.split())
    assert "0.5 length + sampled:spread; only logged: length" in shown
    assert "3 completions of each prompt, up to 6 tokens, sampled by hf every step, learned from 2 times" in shown
    assert "12 of 4 prompts" in shown and "moving average of the policy" in shown
    # Keys and values of two layers at a time: 32 completions of 6 tokens after prompts of 16.
    longest = max(len(row["prompt"]) for row in run(folder, tmp_path / "rows").data.train)
    prepared = run(folder, tmp_path / "run", *more)
    args = prepared.trainer.args
    predicted = memory.predict(memory.shape(prepared.run, args, prepared.model, prepared.data.train, "frozen"))
    assert predicted["rollouts"] == 32 * (longest + 6) * 2 * (2 * 2 * 8) * 4
    assert {"reward", "rollouts"} <= docs.sections(prepared.run.objective).keys()
    flags = [row.flag for row in docs.sections(prepared.run.objective)["rollouts"]]
    assert flags == ["--rollouts.group_size", "--rollouts.every", "--rollouts.epochs"]
    assert [row.flag for row in docs.sections(find("kd"))["rollouts"]] == [f"--rollouts.{name}" for name in OF_DISTILLATION]
    assert "Data: Prompts alone" in docs.show("rlhf")


def test_distinct_bigrams() -> None:
    assert distinct([[1, 2, 1, 2], [1, 2]], 2) == [2 / 4] and distinct([[1], [1]], 1) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["reward=nothing"], "reward.name = 'nothing'"),
        (["reward=[{name: length, weight: a}]"], "reward.weight = 'a'"),
        (["reward.heldout=regexp"], "reward.heldout.name = 'regexp'"),
        (["rollouts.student=0.5"], "rollouts.student is for methods of distillation"),
        (["sampling.temperature=0"], "temperature = 0 always writes the same"),
        (["engine.kind=file", "engine.path=x"], "kind = file holds completions"),
        (["engine.url=http://x"], "engine.url is for vllm server and would be ignored by hf"),
        (["beta=1", "reference.kind=cached"], "none of their log-probs can be cached"),
        (["reference.kind=frozen"], "sampled reads no reference"),
        (["beta=1", "reference.rate=0.1"], "reference.rate is for kind = ema"),
        (["beta=1", "reference.kind=soup"], "needs reference.models"),
        (["objective.name=rlhf", "rollouts.group_size=1"], "rollouts.group_size = 1: advantage = rloo compares"),
        (["objective.name=superhf", "rollouts.group_size=1"], "rollouts.group_size = 1: of a group the best 1"),
        (["sampling.max_new_tokens=300"], "are more than the 256 positions"),
    ],
)
def test_mistakes(folder: Path, tmp_path: Path, words: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        run(folder, tmp_path, *words)


def test_settings_that_another_method_would_ignore(folder: Path) -> None:
    base = [f"model={folder / 'model'}", f"data={folder / 'rows.jsonl'}"]
    with pytest.raises(UserError, match="reward: dpo learns from completions of the data"):
        load_run("dpo", None, [*base, "reward=length"])
    with pytest.raises(UserError, match=r"rollouts.group_size is for online methods"):
        load_run("kd", None, [*base, "teacher=x", "rollouts.student=1", "rollouts.group_size=2"])
    for name, more, says in (
        ("rlhf", ["reward=length"], "rlhf samples its completions"),
        ("dpo", ["reference.kind=ema"], "reference.kind = ema is not kept on disk"),
    ):
        with pytest.raises(UserError, match=f"logps: {says}"):
            precompute(load_run(name, None, [*base, *more]))
    with pytest.raises(UserError, match="reward: sampled needs one"):
        load_run("sampled", None, [*base, "imports=[sampled]"])
