"""RLHF with KL and SuperHF in the trainer: settings of each kind train, on the policy where they should; states go on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import settings_of, train
from tiny_models import saved

from posttrain.recipe import load_run
from posttrain.reference import FrozenModel
from posttrain.run import Prepared, prepare
from posttrain.steps import StepTrainer
from posttrain.transcript import read_transcript


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rlhf")
    saved(root / "model")
    rows = [{"prompt": f"ab {i}?", "bonus": 0} for i in range(4)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def trained(folder: Path, output: Path, *more: str, method: str = "rlhf", resume: str | None = None) -> Prepared:
    """Two steps of two prompts, three completions each."""
    ours = ["reward=sampled:spread", "rollouts.group_size=3", "sampling.max_new_tokens=5"]
    ours += ["train.max_steps=2", "train.per_device_train_batch_size=2"]
    return train(prepare(load_run(method, None, settings_of(folder, output, *ours, *more))), resume)


def logs(prepared: Prepared) -> list[dict[str, Any]]:
    return [line for line in prepared.trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize(
    ("settings", "metrics"),
    [
        (["beta=0.2"], ["kl/weight", "mismatch/weight/ess", "groups/alike"]),
        (["advantage=reinforce_pp", "kl_estimate=analytic"], ["kl/analytic"]),
        (["kl=loss", "kl_estimate=k3", "advantage=grpo", "mean=sequences"], ["kl/k3"]),
        (["kl=none", "token_weights=steer", "ratio=sequence_mean"], ["steer"]),
        (["token_weights=kl_cov", "cov_share=0.2"], ["covariance/max"]),
        (["entropy_bonus=1e-3", "entropy_range=[0.05,0.23]", "entropy_drop=0.2"], ["entropy/rewarded", "entropy/weight"]),
    ],
    ids=["rloo", "analytic", "k3", "steer", "kl_cov", "entropy"],
)
def test_trains_on_the_policy(settings: list[str], metrics: list[str], folder: Path, tmp_path: Path) -> None:
    first, second = logs(trained(folder, tmp_path, *settings))
    for line in (first, second):
        assert line["ratio/max"] == pytest.approx(1, abs=1e-5) and line["kl/old"] == pytest.approx(0, abs=1e-6)
        assert all(name in line for name in metrics)
        assert not line["clip/low"] and not line["clip/high"]
    assert first["loss"] != second["loss"]


def test_a_round_may_teach_nothing(folder: Path, tmp_path: Path) -> None:
    """No completion comes to its end within 5 tokens: none is learned from, and nothing is said of any."""
    (first, second) = logs(trained(folder, tmp_path, "mask_truncated=true", "sampling.stop_at_eos=false"))
    for line in (first, second):
        assert line["rollouts/kept"] == 0 and line["loss"] == 0 and line["grad_norm"] == 0
        assert "ratio/max" not in line and line["kl/weight"] == pytest.approx(0.05)


PRINTABLE = [chr(number) for number in range(32, 127)]


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("rlhf", ["mean=sequences", "advantage=grpo"]),
        ("rlhf", ["advantage=gae", "mean=sequence_sums", "ratio=sequence"]),
        ("rlhf", ["advantage=reinforce_pp", "token_weights=steer", "kl=loss", "correction=sequence_mask"]),
        ("superhf", []),
        ("superhf", ["kl_reduction=examples", "minibatch=2"]),
    ],
)
def test_completions_that_a_stop_string_left_without_tokens(
    method: str, settings: list[str], folder: Path, tmp_path: Path
) -> None:
    """Some of each round, scored as the empty text; nothing of them is learned, and SuperHF keeps none."""
    stop = f"sampling.stop={json.dumps(PRINTABLE)}"
    prepared = trained(folder, tmp_path, *settings, stop, method=method)
    written = read_transcript(tmp_path)
    texts = [text for line in written for text in line["completions"]]
    assert not set("".join(texts)) & set(PRINTABLE) and 3 <= texts.count("") <= 9
    for line in logs(prepared):
        assert math.isfinite(line["loss"]) and line["grad_norm"] > 0 and line["rollouts/mismatch/max"] < 1.001
    for line in written:
        scores = [line["scores"]["sampled:spread"][at] for at, text in enumerate(line["completions"]) if not text]
        assert scores == [0.0] * len(scores)
        if method == "superhf":
            kept = [text for text, one in zip(line["completions"], line["learned_from"], strict=True) if one]
            assert len(kept) == (len(set(line["completions"])) > 1 or line["completions"][0] != "") and "" not in kept


@pytest.mark.parametrize("method", ["rlhf", "superhf"])
def test_a_round_without_tokens(method: str, folder: Path, tmp_path: Path) -> None:
    """The text of each completion's first token is a stop string: nothing is learned, and nobody stumbles, not even over what a
    checkpoint holds of it."""
    strings = [*PRINTABLE, "\ufffd", *map(chr, range(32))]
    more = ["sampling.max_new_tokens=1", "rollouts.epochs=2", "train.save_steps=1", f"sampling.stop={json.dumps(strings)}"]
    trained(folder, tmp_path, *more, method=method)
    prepared = trained(folder, tmp_path, *more, method=method, resume=str(tmp_path / "checkpoint-1"))
    first, second = logs(prepared)
    assert first["rollouts/length"] == 0 and first["rollouts/finished"] == 1
    assert first["loss"] == second["loss"] == 0 and first["grad_norm"] == second["grad_norm"] == 0


def test_a_critic_learns_beside_the_policy(folder: Path, tmp_path: Path) -> None:
    """Its values start at 0; under clipping a second pass over the round is off the policy."""
    more = ["advantage=gae", "rollouts.group_size=1", "rollouts.epochs=2", "train.max_steps=4", "value_learning_rate=0.1"]
    prepared = trained(folder, tmp_path, *more, "train.per_device_train_batch_size=4")
    lines = logs(prepared)
    assert lines[0]["values"] == 0 and lines[1]["values"] != 0
    assert lines[1]["values/loss"] < lines[0]["values/loss"]
    assert lines[0]["ratio/max"] == pytest.approx(1, abs=1e-5) and lines[1]["ratio/max"] > 1 + 1e-4
    assert not any("objective" in name for name in prepared.model.state_dict() if "value" not in name)


def test_the_weight_of_the_kl_follows_its_target(folder: Path, tmp_path: Path) -> None:
    """The policy is at the reference in the first round, which lowers the weight; that is in checkpoints."""
    more = [
        "beta=0.2",
        "kl_target=5.0",
        "kl_horizon=60",
        "train.max_steps=3",
        "train.save_strategy=steps",
        "train.save_steps=1",
        "train.save_total_limit=9",
    ]
    whole = trained(folder, tmp_path, *more)
    weights = [line["kl/weight"] for line in logs(whole)]
    assert weights[0] == pytest.approx(0.2) and weights[1] == pytest.approx(0.2 * (1 - 0.2 * 6 / 60))
    resumed = trained(folder, tmp_path, *more, resume=str(tmp_path / "checkpoint-1"))
    assert [line["kl/weight"] for line in logs(resumed)] == weights
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_superhf_learns_from_the_best(folder: Path, tmp_path: Path) -> None:
    first, second = logs(trained(folder, tmp_path, "beta=0.5", method="superhf"))
    assert abs(first["kl/forward"]) < 1e-6 and second["kl/forward"] > 1e-4
    assert first["reward/kept"] >= first["reward"] and first["rollouts/kept"] == pytest.approx(1 / 3)


def test_the_reference_is_asked_once_a_round(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its log-probs stay with the round; where the loss needs its output head it is asked again."""
    asked = []
    answer, heads = FrozenModel.answer, FrozenModel.heads
    monkeypatch.setattr(FrozenModel, "answer", lambda *args: asked.append("logps") or answer(*args))
    monkeypatch.setattr(FrozenModel, "heads", lambda *args: asked.append("head") or heads(*args))
    more = ["rollouts.every=2", "rollouts.epochs=2", "train.max_steps=4", "layout=tree"]
    trained(folder, tmp_path / "reward", "beta=0.2", *more)
    before = asked.count("logps")
    trained(folder, tmp_path / "k3", "kl=loss", "kl_estimate=k3", *more)
    assert asked.count("logps") == 2 * before, "the loss reads what is kept"
    assert "head" not in asked
    kept = trained(folder, tmp_path / "k3 again", "kl=loss", "kl_estimate=k3", *more).trainer
    monkeypatch.setattr(StepTrainer, "_batch", lambda self, rows, known: self.data_collator(rows))
    again = trained(folder, tmp_path / "asked", "kl=loss", "kl_estimate=k3", *more).trainer
    assert asked.count("logps") > 4 * before
    for one, other in zip(kept.model.parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
