"""`posttrain iterate`: what an iteration makes, that it goes on wherever it was killed, its users, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import saved

from posttrain import sample
from posttrain.cli import main
from posttrain.iterate import check, iterate
from posttrain.iterations import load_iterate_run
from posttrain.recipe import load_run
from posttrain.records import read_metrics
from posttrain.schema import UserError
from posttrain.settings import EngineConfig

HERE = Path(__file__).parent
PROMPTS = [f"say {i} ab?" for i in range(15)]
KILLS = [
    ["posttrain.sample", "_line", 3, "before"],
    ["posttrain.verdicts", "settle", 2, "before"],
    ["posttrain.reference", "_write_shard", 1, "after"],
    ["posttrain.iterate", "logp_sums", 1, "after"],
    ["posttrain.checkpoints", "write_manifest", 2, "before"],
    ["posttrain.checkpoints", "write_manifest", 1, "after"],
    ["posttrain.run", "export", 1, "before"],
    ["posttrain.iterate", "evaluated", 1, "before"],
    ["posttrain.sample", "_line", 1, "after"],
    ["posttrain.iterate", "judged", 2, "before"],
]
"""In the order in which a run of two iterations comes to them; each is counted from where the one before was killed."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer."""
    return saved(tmp_path_factory.mktemp("model"), bos_token_id=1, eos_token_id=2)


def command(folder: Path, output: Path) -> list[str]:
    """Two iterations of seven prompts, three responses each; two steps on pairs, a checkpoint after each."""
    data = folder / "prompts.jsonl"
    rows = ({"prompt": text, "answer": i} for i, text in enumerate(PROMPTS))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        f"model={folder}",
        f"data={data}",
        "data.max_length=64",
        "iterations.count=2",
        "iterations.responses=3",
        "sampling.max_new_tokens=6",
        "engine.batch_size=6",
        f"train.output_dir={output}",
        "train.max_steps=2",
        "train.per_device_train_batch_size=2",
        "train.learning_rate=1e-3",
        "train.logging_steps=1",
        "train.save_steps=1",
    ]


INPO = ["objective=inpo", "eta=0.1", "preference=judging:circular", "reward=judging:vowels"]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "iteration-2" / "model" / "model.safetensors")


@pytest.fixture
def words(folder: Path, tmp_path: Path) -> list[str]:
    return command(folder, tmp_path / "out")


@pytest.fixture(scope="module")
def inpo(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """INPO, uninterrupted."""
    output = tmp_path_factory.mktemp("inpo")
    found = iterate(load_iterate_run(None, [*command(folder, output), *INPO]))
    assert [one["iteration"] for one in found] == [1, 2]
    return output


def test_an_iteration_is_on_its_own_prompts_and_responses(inpo: Path) -> None:
    parts = [lines(inpo / name / "prompts.jsonl") for name in ("start", "iteration-1", "iteration-2")]
    asked = [json.loads(line["source"])["row"]["prompt"] for part in parts for line in part]
    assert [len(part) for part in parts] == [1, 7, 7] and sorted(asked) == sorted(PROMPTS)
    for part, iteration in zip(parts[1:], ("iteration-1", "iteration-2"), strict=True):
        responses, verdicts = (lines(inpo / iteration / f"{name}.jsonl") for name in ("responses", "verdicts"))
        assert [line["prompt_ids"] for line in responses] == [line["prompt"] for line in part]
        pairs = [
            (line["prompt_ids"], line["completion_ids"][v["best"]], line["completion_ids"][v["worst"]], v["preference"])
            for line, v in zip(responses, verdicts, strict=True)
            if v["preference"] > 0.5
        ]
        rows = lines(inpo / iteration / "rows.jsonl")
        assert len(pairs) > 0 and [(row["prompt"], row["chosen"], row["rejected"]) for row in rows] == [p[:3] for p in pairs]
        assert [row["preference"] for row in rows] == pytest.approx([p[3] for p in pairs])


def test_anchors_are_the_last_iterate_and_the_start(inpo: Path, folder: Path) -> None:
    """Their sums against a forward of each model; and the loss at the first step of each iteration, which follows from them."""
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(path) for path in (folder, inpo / "iteration-1" / "model")]
    for iteration, last in ((1, models[0]), (2, models[1])):
        rows = lines(inpo / f"iteration-{iteration}" / "rows.jsonl")
        for row in rows:
            for role in ("chosen", "rejected"):
                assert row[f"previous_{role}"] == pytest.approx(logp(last, row["prompt"], row[role]), abs=1e-4)
        margins = [[margin(one, row) for row in rows] for one in models]
        target, h = 5.0, [iteration // 2 * (later - start) / 3 for start, later in zip(*margins, strict=True)]
        first = read_metrics(inpo / f"iteration-{iteration}" / "model")[0]["loss"]
        assert min((x - target) ** 2 for x in h) - 1e-3 <= first <= max((x - target) ** 2 for x in h) + 1e-3
    assert first != pytest.approx(25, abs=1e-3)


def margin(model: Any, row: dict[str, Any]) -> float:
    return logp(model, row["prompt"], row["chosen"]) - logp(model, row["prompt"], row["rejected"])


def logp(model: Any, prompt: list[int], completion: list[int]) -> float:
    """By a plain forward."""
    with torch.no_grad():
        logps = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    return sum(logps[len(prompt) + i - 1, token].item() for i, token in enumerate(completion))


def test_metrics(inpo: Path) -> None:
    first, second = lines(inpo / "iterations.jsonl")
    for one in (first, second):
        assert one["prompts"] == 7 and 0.5 < one["preference"] <= 0.9 and 0 < one["kept"] <= 1 and 1 <= one["length"] <= 6
        assert 0 < one["reward"] < 1 and 0 <= one["win/start"] <= 1
    assert first["win/previous"] == first["win/start"] and first["kl/previous"] == first["kl/start"] != 0
    assert second["kl/previous"] != second["kl/start"]


@pytest.mark.slow
def test_killed_in_every_phase_it_ends_with_the_same_weights(inpo: Path, folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    asked = json.dumps({"words": ["iterate", *command(folder, again), *INPO], "places": KILLS})
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, HERE / "killed.py", asked], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    ours, theirs = weights(inpo), weights(again)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert lines(inpo / "iterations.jsonl") == lines(again / "iterations.jsonl")
    for name in ("responses", "verdicts", "rows", "evaluation"):
        assert lines(inpo / "iteration-2" / f"{name}.jsonl") == lines(again / "iteration-2" / f"{name}.jsonl")


def test_what_is_done_is_not_done_again(inpo: Path, folder: Path) -> None:
    words = command(folder, inpo)
    before = (inpo / "iteration-2" / "model" / "model.safetensors").stat().st_mtime_ns
    iterate(load_iterate_run(None, [*words, *INPO]))
    assert (inpo / "iteration-2" / "model" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"is another run's: objective\.eta is 0\.1 there and 0\.2 here; choose another folder"):
        iterate(load_iterate_run(None, [*words, *INPO, "eta=0.2"]))


def test_iterative_dpo(words: list[str], tmp_path: Path) -> None:
    """By scores; at the first step of the first iteration the policy is the reference, in the second it is not."""
    run = load_iterate_run(None, [*words, "objective=dpo", "reward=judging:vowels"])
    assert run.select == "scores"
    iterate(run)
    for iteration in (1, 2):
        part = tmp_path / "out" / f"iteration-{iteration}"
        for verdict in lines(part / "verdicts.jsonl"):
            scores = verdict["scores"]
            assert scores[verdict["best"]] == max(scores) and scores[verdict["worst"]] == min(scores)
        loss = read_metrics(part / "model")[0]["loss"]
        assert (loss == pytest.approx(math.log(2), abs=1e-5)) is (iteration == 1)


def test_the_last_iterate_as_reference_with_an_adapter(words: list[str], tmp_path: Path) -> None:
    """Each iteration starts at its reference; iterates are exported merged."""
    more = ["objective=dpo", "reward=judging:vowels", "iterations.reference=previous", "model.peft={r: 2}"]
    iterate(load_iterate_run(None, [*words, *more]))
    for iteration in (1, 2):
        model = tmp_path / "out" / f"iteration-{iteration}" / "model"
        assert read_metrics(model)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert (model / "model.safetensors").is_file()


def test_best_of_n(words: list[str], tmp_path: Path) -> None:
    """Supervised fine-tuning on the best response alone; those that are not good enough are left out."""
    iterate(load_iterate_run(None, [*words, "objective=sft", "reward=judging:vowels", "iterations.at_least=0.05"]))
    part = tmp_path / "out" / "iteration-1"
    responses, verdicts, rows = (lines(part / f"{name}.jsonl") for name in ("responses", "verdicts", "rows"))
    best = [
        {"prompt": line["prompt_ids"], "completion": line["completion_ids"][one["best"]]}
        for line, one in zip(responses, verdicts, strict=True)
        if max(one["scores"]) >= 0.05
    ]
    assert 0 < len(best) < 7 and rows == best


@pytest.mark.parametrize(
    ("more", "columns"),
    [
        (["objective=kto", "data.unpair=true"], []),
        (["objective=sppo_soft", "iterations.select=everyone"], ["chosen_win", "rejected_win"]),
        (["objective=mmpo"], ["score_chosen", "score_rejected"]),
    ],
)
def test_methods_with_labels_wins_and_scores(more: list[str], columns: list[str], words: list[str], tmp_path: Path) -> None:
    """KTO takes the pairs apart; SPPO reads how often a response wins, MMPO its score."""
    judged = ["preference=judging:circular", "reward=judging:vowels", "iterations.count=1", "train.max_steps=1"]
    run = load_iterate_run(None, [*words, *judged, *more])
    assert run.columns == columns
    (found,) = iterate(run)
    rows = lines(tmp_path / "out" / "iteration-1" / "rows.jsonl")
    assert len(rows) == round(found["kept"] * found["prompts"]) and all(set(columns) <= row.keys() for row in rows)
    if "chosen_win" in columns:
        assert all(row["chosen_win"] >= row["rejected_win"] for row in rows)


def test_responses_sampled_elsewhere(words: list[str], inpo: Path, tmp_path: Path) -> None:
    """A file for each iteration; the run waits for the second, and then goes on."""
    for iteration in (1, 2):
        (tmp_path / f"{iteration}.jsonl").write_text((inpo / f"iteration-{iteration}" / "responses.jsonl").read_text())
    path = tmp_path / "{iteration}.jsonl"
    there = [word for word in words if not word.startswith("engine")]
    run = load_iterate_run(None, [*there, *INPO, "engine=file", f"engine.path={path}"])
    (tmp_path / "2.jsonl").rename(tmp_path / "later")
    with pytest.raises(UserError, match=r"2\.jsonl: no such file"):
        iterate(run)
    (tmp_path / "later").rename(tmp_path / "2.jsonl")
    iterate(run)
    ours, theirs = weights(inpo), weights(tmp_path / "out")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_responses_that_a_stop_string_left_without_tokens(words: list[str], tmp_path: Path) -> None:
    """They are judged as the empty text, pairs with one are left out, as rows of data are, and iterates are still compared."""
    stop = f"sampling.stop={json.dumps([chr(number) for number in range(32, 127)])}"
    more = [stop, "objective=dpo", "reward=judging:vowels", "iterations.count=1", "train.max_steps=1", "data.eval_size=6"]
    (found,) = iterate(load_iterate_run(None, [*words, *more]))
    part = tmp_path / "out" / "iteration-1"
    sizes = [len(ids) for line in lines(part / "responses.jsonl") for ids in line["completion_ids"]]
    assert sizes.count(0) > 3 and found["length"] == pytest.approx(sum(sizes) / len(sizes))
    assert all(math.isfinite(found[name]) for name in ("kl/start", "win/start", "reward"))


def test_a_server_is_given_the_weights_of_each_iterate(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the start, too: it may have others from an earlier run."""
    build, seen = sample.build, []

    def recorded(config: Any, *args: Any, folder: Path | None, **kwargs: Any) -> Any:
        engine = build(EngineConfig(), *args, **kwargs)
        monkeypatch.setattr(engine, "sync", lambda version: seen.append((version, folder)))
        return engine

    monkeypatch.setattr(sample, "build", recorded)
    there = [word for word in words if not word.startswith("engine")]
    more = ["objective=dpo", "reward=judging:vowels", "iterations.count=1", "train.max_steps=1", "engine=vllm"]
    iterate(load_iterate_run(None, [*there, *more, "engine.url=http://localhost:1"]))
    out = tmp_path / "out"
    assert seen == [(0, out / "iteration-1/.weights"), (0, out / "start/.weights"), (1, out / "iteration-1/.weights")]


@pytest.mark.slow
def test_trained_in_processes_of_its_own(inpo: Path, words: list[str], tmp_path: Path) -> None:
    """They are given a recipe, and find the reference's log-probs on disk."""
    iterate(load_iterate_run(None, [*words, *INPO]), ["--launch", "single"])
    ours, theirs = weights(inpo), weights(tmp_path / "out")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["objective=dpo"], "nobody judges the responses; give preference"),
        (["objective=dpo", "reward=lenght"], "reward.name = 'lenght'; did you mean length"),
        (["objective=dpo", "reward=length", "iterations.cuont=2"], "iterations: unknown key 'cuont'; did you mean count"),
        (["objective=dpo", "preference=length", "iterations.select=scores"], "select = scores needs a reward"),
        (["objective=sft", "reward=length", "iterations.select=tournament"], "learns from the best response alone"),
        (["objective=mmpo", "preference=length"], "reads 'score_chosen' of each row, which takes a reward"),
        (["objective=sppo_soft", "preference=length"], "takes iterations.select = everyone"),
        (["objective=kto", "reward=length"], "reads 'label' of each row. Possible here: .*; data.unpair makes labels"),
        (["objective=kd", "teacher=X", "reward=length"], "kd has a teacher"),
        (["objective=rlhf", "reward=length"], "rlhf samples within its training already: posttrain train"),
        (["objective=dpo", "reward=length", "model.revision=main"], "give a folder"),
        (["objective=dpo", "reward=length", "sampling.temperature=0"], "makes all responses to a prompt the same"),
        (["objective=dpo", "reward=length", "sampling.max_new_tokens=64"], "leaves no room for a prompt"),
        (["objective=dpo", "reward=length", "engine=file"], "engine.path is required"),
        (["objective=dpo", "reward=length", "train.push_to_hub=true"], "would push every iterate"),
        (["objective=dpo", "reward=length", "iterations.prompts=8"], "2 iterations of 8 prompts and 1 to evaluate on are more"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], more: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = [word for word in words if "engine.batch_size" not in word]
    with pytest.raises(UserError, match=message):
        check(load_iterate_run(None, [*words, *more]))
    with pytest.raises(SystemExit) as end:
        main(["iterate", *words, *more])
    assert end.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not list((tmp_path / "out").glob("iteration-*"))


def test_check_says_what_it_would_do(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("objective: {name: inpo}\niterations: {count: 2}\npreference: judging:circular\n")
    with pytest.raises(SystemExit) as end:
        main(["check", str(recipe), *words])
    said = capsys.readouterr().out
    assert end.value.code == 0 and "7, 7 in 2 iterations; 1 to compare iterates on" in said
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="iterations is for training in iterations: posttrain iterate"):
        load_run(None, recipe)
