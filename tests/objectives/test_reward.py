"""The Bradley-Terry loss, and that a trained model scores wherever it is loaded as it did in training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import close, golden, tensor
from tiny import tiny_tokenizer
from tiny_models import SHARING, tiny
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from posttrain.check import check
from posttrain.models import Request, model_inputs
from posttrain.objectives.reward.reward import RewardConfig, reward
from posttrain.recipe import load_run
from posttrain.records import read_metrics
from posttrain.rewards.judges import RewardModel
from posttrain.run import execute, prepare
from posttrain.schema import UserError
from posttrain.scores import Scored, Scores
from posttrain.scoring import attach_scores, pad_apart
from posttrain.trees import TreeCollator


def scored(chosen: Any, rejected: Any, margin: Any = None) -> Scored:
    chosen, rejected = tensor(chosen).requires_grad_(), tensor(rejected).requires_grad_()
    ones = torch.ones(len(chosen), dtype=torch.int64)
    sides = {name: Scores(values=values, lengths=ones) for name, values in (("chosen", chosen), ("rejected", rejected))}
    return Scored(**sides, margin=torch.zeros(len(chosen)) if margin is None else tensor(margin))


def test_golden() -> None:
    file = golden("reward_model_bt")
    inputs, outputs = file.inputs, file.outputs
    plain = reward(RewardConfig(), scored(inputs["chosen"], inputs["rejected"]))
    close(plain.values.mean(), outputs["loss"])
    close(plain.metrics["rewards/accuracies"].mean(), outputs["accuracy"])
    apart = reward(RewardConfig(), scored(inputs["chosen"], inputs["rejected"], inputs["margin"]))
    close(apart.values.mean(), outputs["loss_margin"])
    centred = reward(RewardConfig(center=inputs["center_coef"]), scored(inputs["chosen"], inputs["rejected"]))
    close(centred.values.mean(), outputs["loss"] + outputs["center_term"])
    close(inputs["center_coef"] * centred.metrics["rewards/center"].mean(), outputs["center_term"])


def test_by_hand() -> None:
    """Scores 2 and 0, margin 1: log(1 + e^-1) + 0.5 * 4; slope -sigmoid(-1) + 0.5 * 2 * 2 in the chosen score."""
    pairs = scored([2.0], [0.0], [1.0])
    loss = reward(RewardConfig(center=0.5), pairs)
    close(loss.values, [math.log1p(math.exp(-1)) + 2])
    one, other = torch.autograd.grad(loss.values.sum(), (pairs.chosen.values, pairs.rejected.values))
    slope = 1 / (1 + math.e)
    close(one, [2 - slope])
    close(other, [2 + slope])
    assert loss.metrics["rewards/margins"].item() == 2  # scores as they are; the margin asked for is no score


def test_far_apart_is_finite() -> None:
    loss = reward(RewardConfig(), scored([1e4, -1e4], [-1e4, 1e4]))
    close(loss.values, [0, 2e4])


@pytest.mark.parametrize("name", SHARING)
def test_scores_of_trees_are_those_of_the_library(name: str) -> None:
    """Of chosen and rejected completions that share their prompt, read at their last tokens, packed or apart."""
    model = tiny(name, scores=True)
    attach_scores(model)
    rows = [
        {"prompt": list(range(5, 14)), "chosen": [[20, 21, 22]], "rejected": [[23]]},
        {"prompt": [30, 31], "chosen": [list(range(40, 51))], "rejected": [[51, 52]]},
    ]
    texts = [row["prompt"] + row[role][0] for role in ("chosen", "rejected") for row in rows]
    with torch.no_grad():
        own = torch.cat([model(input_ids=torch.tensor([text])).logits[:, 0] for text in texts])
        for layout in ("tree", "separate"):
            batch = TreeCollator(roles=("chosen", "rejected"), layout=layout, whole=True)(rows)
            assert batch["targets"].tolist() == [text[-1] for text in texts]
            request = Request(gather=batch["gather"], targets=batch["targets"], want=("score",))
            got = model(**model_inputs(model, batch, layout), statistics=request)["score"]
            torch.testing.assert_close(got, own, rtol=0, atol=2e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model whose tokenizer pads with its end token, and pairs in which the longer answer is preferred."""
    folder = tmp_path_factory.mktemp("reward")
    tokenizer = tiny_tokenizer()
    tiny("llama", vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": f"{n}?", "chosen": "yes " * (2 + n % 3), "rejected": "no", "margin": n % 2} for n in range(24)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def trained(folder: Path, output: Path, *more: str) -> Any:
    changes = [f"model={folder / 'model'}", f"data={folder / 'data.jsonl'}", f"train.output_dir={output}"]
    changes += ["train.max_steps=30", "train.learning_rate=3e-3", "train.per_device_train_batch_size=8", "data.eval_size=8"]
    changes += ["train.logging_steps=1", "train.save_strategy=no"]
    return execute(load_run("reward", overrides=[*changes, *more]))


def judged(model: Path, prompts: list[Any], completions: list[str], **settings: Any) -> list[float]:
    return RewardModel(model=str(model), **settings)(prompts, completions, [{}] * len(prompts))


@pytest.mark.parametrize("form", ["chat", "plain"])
def test_trains_and_scores_alike_everywhere(form: str, folder: Path, tmp_path: Path) -> None:
    """In training, by transformers and as a judge; the texts end in the end token of a template, or in none."""
    done = trained(folder, tmp_path / "out", f"data.format={form}")
    logs = read_metrics(tmp_path / "out")
    assert logs[0]["rewards/accuracies"] == 0.5 and logs[0]["rewards/chosen"] == 0  # a new output is 0
    evaluated = next(line for line in reversed(logs) if "eval_loss" in line)
    assert evaluated["eval_rewards/accuracies"] == 1 and evaluated["eval_loss"] < 0.35
    trainer, rows = done.trainer, list(done.data.eval)
    statistics = trainer.statistics(trainer.model, trainer.collator()(rows))
    ours = torch.cat([statistics.chosen.values, statistics.rejected.values]).detach()
    model, tokenizer = (kind.from_pretrained(tmp_path / "out") for kind in (AutoModelForSequenceClassification, AutoTokenizer))
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    texts = [row["prompt"] + row[role][0] for role in ("chosen", "rejected") for row in rows]
    padded = tokenizer.pad({"input_ids": texts}, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**padded).logits[:, 0], ours, rtol=0, atol=1e-5)
    raw = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    read = {tokenizer.decode(row["prompt"], skip_special_tokens=True): row for row in rows}
    assert len(read) == len(rows)
    for side in ("chosen", "rejected"):
        chat = form == "chat"
        scores = judged(tmp_path / "out", [row["prompt"] for row in raw], [row[side] for row in raw], format=form)
        by_prompt = dict(zip([row["prompt"] for row in raw], scores, strict=True))
        named = [text for text in by_prompt for said in read if text in said.split("\n" if chat else "\0")]
        found = {said: by_prompt[text] for text in named for said in read if text in said.split("\n" if chat else "\0")}
        expected = dict(zip(read, vars(statistics)[side].values.tolist(), strict=True))
        assert found == pytest.approx(expected, abs=1e-5)


def test_margins_come_from_a_column_where_there_is_one(folder: Path, tmp_path: Path) -> None:
    settings = [f"model={folder / 'model'}", f"data={folder / 'data.jsonl'}", f"train.output_dir={tmp_path / 'out'}"]
    with_margins = prepare(load_run("reward", overrides=settings)).data.train["margin"][:]
    assert sorted(set(with_margins)) == [0, 1]
    bare = tmp_path / "bare.jsonl"
    bare.write_text(json.dumps({"prompt": "a?", "chosen": "yes", "rejected": "no"}) + "\n", encoding="utf-8")
    settings = [*settings[:1], f"data={bare}", f"train.output_dir={tmp_path / 'other'}"]
    assert prepare(load_run("reward", overrides=settings)).data.train["margin"][:] == [0]


@pytest.mark.parametrize("merge", [False, True])
def test_an_adapter_and_its_merge(merge: bool, folder: Path, tmp_path: Path) -> None:
    from peft import AutoPeftModelForSequenceClassification

    settings = ["model.peft={r: 4, lora_alpha: 8}", "train.max_steps=10", f"model.merge={merge}"]
    done = trained(folder, tmp_path / "out", *settings)
    ids = torch.tensor([done.data.eval[0]["prompt"] + done.data.eval[0]["chosen"][0]])
    if merge:
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    else:
        model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=1)
    with torch.no_grad():
        expected = done.model.eval()(input_ids=ids).logits
        assert expected.abs() > 1e-3
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
    judge = RewardModel(model=str(tmp_path / "out"))
    with torch.no_grad():
        assert judge.network(input_ids=ids).logits.item() == pytest.approx(expected.item(), abs=1e-5)


def test_goes_on_from_a_reward_model(folder: Path, tmp_path: Path) -> None:
    """Its output is kept; a classifier with several labels is refused, and a tokenizer that cannot pad."""
    model = tiny("llama", scores=True, vocab_size=len(tiny_tokenizer()))
    model.save_pretrained(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    settings = [f"model={tmp_path / 'model'}", f"data={folder / 'data.jsonl'}", f"train.output_dir={tmp_path / 'out'}"]
    got = prepare(load_run("reward", overrides=settings)).model
    assert torch.equal(got.score.weight, model.score.weight) and got.score.weight.abs().max() > 0
    model.config.num_labels = 3
    AutoModelForSequenceClassification.from_config(model.config).save_pretrained(tmp_path / "model")
    settings[-1] = f"train.output_dir={tmp_path / 'other'}"
    with pytest.raises(UserError, match="has 3 labels; a language model or one label is needed"):
        prepare(load_run("reward", overrides=settings))
    tokenizer.pad_token = tokenizer.bos_token = tokenizer.unk_token = tokenizer.eos_token
    with pytest.raises(UserError, match="give a tokenizer with a pad_token of its own"):
        pad_apart(tokenizer)


def test_optimum_is_the_log_odds_of_the_preferences() -> None:
    """a is preferred to b 3 times of 4: r_a - r_b = log 3; centring puts the sum at 0 and takes nothing of that."""
    scores = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    one = torch.ones(4, dtype=torch.int64)
    optimizer = torch.optim.LBFGS([scores], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        chosen, rejected = scores[[0, 0, 0, 1]] + 1, scores[[1, 1, 1, 0]] + 1  # off centre
        sides = {"chosen": Scores(values=chosen, lengths=one), "rejected": Scores(values=rejected, lengths=one)}
        loss = reward(RewardConfig(center=0.1), Scored(**sides, margin=torch.zeros(4))).values.mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    close(scores[0] - scores[1], math.log(3), 1e-6)
    close(scores.sum(), -2.0, 1e-6)


def test_what_check_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No vocabulary is read, so none is in the prediction of memory."""
    check(load_run("reward", overrides=[f"model={folder / 'model'}", f"data={folder / 'data.jsonl'}"]))
    said = capsys.readouterr().out
    assert "margin <- margin" in said and "weights 0.00 GiB" in said and "vocabulary" not in said
