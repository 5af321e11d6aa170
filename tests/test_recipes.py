"""Every recipe in the folder is short, says what it is, reads strictly, and trains two steps on a tiny model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from tiny_models import saved

from posttrain import docs, registry, shipped
from posttrain.iterate import iterate
from posttrain.iterations import load_iterate_run
from posttrain.recipe import Run, load_run
from posttrain.records import read_metrics
from posttrain.run import execute
from posttrain.settings import RewardConfig
from posttrain.stats import columns_of, roles_of
from posttrain.written import merge

EVERY = sorted(shipped.folder("recipes").glob("**/*.yaml"))
ITERATED = [path for path in EVERY if "\niterations:" in path.read_text(encoding="utf-8")]
RECIPES = [path for path in EVERY if path not in ITERATED]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wider than the student."""
    return saved(tmp_path_factory.mktemp("teacher"), hidden_size=48, num_hidden_layers=3, seed=1)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model."""
    return saved(tmp_path_factory.mktemp("judge"), scores=True)


def sampled_changes(run: Run, judge: Path) -> list[str]:
    """Small groups of short completions, sampled here; reward models are `judge`."""
    found = ["rollouts.group_size=3", "sampling.max_new_tokens=8", "engine.kind=hf", "engine.options=null"]
    found += [f"reward.model={judge}"] if "model" in run.reward.scorers[0] else []
    return found + ([f"reward.heldout.model={judge}"] if "model" in (run.reward.heldout or {}) else [])


def rows(run: Run, path: Path, first: int) -> Path:
    """Eight rows that the family of the objective can read."""
    roles, columns = roles_of(run.objective.family), columns_of(run.objective.family)
    if run.objective.online:
        column = run.data.columns.get("prompt", "prompt")
        written = [{column: f"\n\nHuman: ab {i}?\n\nAssistant: yes", "answer": f"{i}"} for i in range(first, first + 8)]
        path.write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")
        return path
    if run.data.unpair:
        roles, columns = ["chosen", "rejected"], []
    written = [
        {"prompt": f"ab {i}?", **{role: f"{role} {i}" for role in roles}, **{column: i % 2 == 0 for column in columns}}
        for i in range(first, first + 8)
    ]
    written = [{run.data.columns.get(name, name): value for name, value in row.items()} for row in written]
    path.write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")
    return path


def test_the_objectives_have_recipes() -> None:
    assert set(docs.recipes().values()) >= set(registry.names())


def test_dpo_has_four_divergences_of_one_model() -> None:
    runs = [load_run(None, path) for path in RECIPES if path.parent.name == "dpo"]
    by_model: dict[str, set[str]] = {}
    for run in runs:
        by_model.setdefault(run.model.name, set()).add(run.config.divergence.split(":")[0])
    assert {"reverse_kl", "forward_kl", "js", "alpha"} in by_model.values()


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.stem)
def test_a_recipe_is_short_and_says_what_it_is(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 20 and lines[0].startswith("# ") and lines[0].endswith(".")
    run = load_iterate_run(path).run if path in ITERATED else load_run(None, path)
    assert path.parent.name == run.objective.name


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains(path: Path, model: Path, teacher: Path, judge: Path, tmp_path: Path) -> None:
    written = load_run(None, path)
    changes = [
        f"model.name={model}",
        "model.tokenizer=null",
        "model.revision=null",
        f"data.name={rows(written, tmp_path / 'train.jsonl', 0)}",
        "data.mixture=[]",
        "data.subset=null",
        "data.split=null",
        f"train.output_dir={tmp_path / 'out'}",
        "train.max_steps=2",
        "train.logging_steps=1",
        "train.per_device_train_batch_size=2",
        "train.gradient_accumulation_steps=2",
    ]
    if written.teacher.model:
        changes += [f"teacher.model={teacher}"]
        changes += [f"teacher.cache={tmp_path / 'cache'}"] if written.teacher.kind == "cached" else []
    elif written.objective.reads_reference(written.config) and not written.objective.reads_teacher:
        changes += [f"reference.cache={tmp_path / 'cache'}"]
    if written.objective.online:
        changes += sampled_changes(written, judge)
    if written.data.eval is not None:
        changes += [f"data.eval.name={rows(written, tmp_path / 'eval.jsonl', 8)}", "data.eval.split=null"]
    if written.data.eval_size:
        changes += ["data.eval_size=2"]
    prepared = execute(load_run(None, path, changes))
    logs = read_metrics(tmp_path / "out")
    assert [line["step"] for line in logs if "loss" in line] == [1, 2]
    start = None if written.teacher.model else prepared.run.objective.start(prepared.run.config)
    first = next(line["loss"] for line in logs if "loss" in line)
    assert start is None or first == pytest.approx(start, abs=1e-4)
    assert any("eval_loss" in line for line in logs) is (prepared.data.eval is not None)
    assert (tmp_path / "out" / "README.md").is_file()


@pytest.mark.parametrize("path", ITERATED, ids=lambda path: path.stem)
def test_a_recipe_of_iterations_trains(path: Path, model: Path, tmp_path: Path) -> None:
    """Two iterations; its judge is left to its own tests: it would find all responses of a random model alike."""
    written, overridden = load_iterate_run(path), {}
    prompts = tmp_path / "prompts.jsonl"
    asked = [{"prompt": f"ab {i}?", "answer": i, "context_messages": [{"role": "user", "content": "b"}]} for i in range(10)]
    asked = [row | {"text": row["prompt"]} for row in asked]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
    changes = {
        "model.name": model,
        "data.name": prompts,
        "data.mixture": "[]",
        "data.subset": "null",
        "data.split": "null",
        "data.max_length": 64,
        "data.max_prompt": 50,
        "iterations.count": 2,
        "iterations.responses": 3,
        "iterations.prompts": 4,
        "iterations.at_least": "null",
        "sampling.max_new_tokens": 6,
        "train.output_dir": tmp_path / "out",
        "train.max_steps": 2,
        "train.per_device_train_batch_size": 2,
        "train.gradient_accumulation_steps": 1,
    }
    if written.engine.kind != "hf":
        changes |= {"engine": "hf", "engine.options": "null"}
    if written.preference:
        overridden["preference"] = {"name": "judging:circular"}
    if written.reward.scorers:
        overridden["reward"] = RewardConfig(scorers=({"name": "judging:vowels"},))
    run = load_iterate_run(path, [f"{key}={value}" for key, value in changes.items()])
    found = iterate(dataclasses.replace(run, **overridden))
    assert [one["iteration"] for one in found] == [1, 2]
    assert all(one["kept"] > 0 and one["kl/start"] != 0 for one in found)
    assert (tmp_path / "out" / "iteration-2" / "model" / "model.safetensors").is_file()


def test_another_name_replaces_a_recipes_with_its_settings(tmp_path: Path) -> None:
    """What says how a scorer or an engine works is not passed on to the next one; the scorer held out is another matter."""
    recipe = tmp_path / "recipe.yaml"
    rest = "objective: rlhf\nmodel: m\ndata: d\nengine: {kind: vllm, options: {dtype: float32}}\n"
    recipe.write_text(rest + "reward: {name: length, target: 20, heldout: {name: regex, pattern: a}}\n")
    run = load_run(recipe=recipe, overrides=["reward=vader", "engine=hf"])
    held = {"name": "regex", "pattern": "a"}
    assert run.reward == RewardConfig(scorers=({"name": "vader"},), heldout=held)
    assert run.engine.kind == "hf" and run.engine.options is None
    same = load_run(recipe=recipe, overrides=["reward=length", "reward.unit=characters", "engine=vllm"])
    assert same.reward.scorers == ({"name": "length", "target": 20, "unit": "characters"},) and same.reward.heldout == held
    assert same.engine.options == {"dtype": "float32"}
    other = load_run(recipe=recipe, overrides=["reward=format", "reward.pattern=b", "reward.heldout=vader"])
    assert other.reward == RewardConfig(scorers=({"name": "format", "pattern": "b"},), heldout={"name": "vader"})
    judged = {"preference": {"name": "pairs", "model": "m"}}
    assert merge(judged, {"preference.name": "module:function"}) == {"preference": {"name": "module:function"}}
    assert merge(judged, {"preference.model": "n"}) == {"preference": {"name": "pairs", "model": "n"}}
