"""A setting that is an objective: completed, refused, overridden, shown and read back from its declaration alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_models import saved

from posttrain import docs, registry
from posttrain.cli import main
from posttrain.nested import nested_settings
from posttrain.objectives.preference.wpo import LOSS, WPOConfig
from posttrain.recipe import Run, load_run
from posttrain.records import read_metrics
from posttrain.schema import UserError

DPO = {"name": "dpo", "beta": 0.01, "divergence": "reverse_kl", "label_smoothing": 0.0}
IPO = {"name": "ipo", "beta": 0.1, "length_normalised": False}


def run(*overrides: str, recipe: Path | None = None) -> Run:
    return load_run("wpo", recipe, ["model=policy", "data=pairs.jsonl", *overrides])


@pytest.mark.parametrize(
    ("overrides", "loss"),
    [
        ([], DPO),
        (["loss.beta=0.2"], {**DPO, "beta": 0.2}),
        (["loss.name=dpo", "loss.label_smoothing=0.1"], {**DPO, "label_smoothing": 0.1}),
        (["loss.name=ipo"], IPO),
        (["loss.name=ipo", "loss.beta=0.2"], {**IPO, "beta": 0.2}),
        (["objective.loss={name: ipo, length_normalised: true}"], {**IPO, "length_normalised": True}),
    ],
)
def test_flags(overrides: list[str], loss: dict[str, object]) -> None:
    """What is not given is the setting's default for the default objective, the objective's own for another."""
    assert run(*overrides).config.loss == loss


def test_recipe_and_flags(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("objective: {name: wpo, loss: {name: ipo, beta: 0.3}}\n")
    assert run(recipe=path).config.loss == {**IPO, "beta": 0.3}
    assert run("loss.length_normalised=true", recipe=path).config.loss == {**IPO, "beta": 0.3, "length_normalised": True}


@pytest.mark.parametrize("overrides", [[], ["loss.name=simpo", "loss.gamma=0.2"]])
def test_the_resolved_run_reads_back(overrides: list[str], tmp_path: Path) -> None:
    whole = run(*overrides)
    path = tmp_path / "run.json"
    path.write_text(json.dumps(whole.resolved()))
    assert load_run(None, path).config == whole.config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.bta=1"], "objective.loss: unknown key 'bta'; did you mean beta? Possible: beta, divergence, label_smoothing"),
        (["loss.name=ipo", "loss.beta=0"], "objective.loss: beta = 0: Input should be greater than 0"),
        (
            ["loss.name=simpo", "loss.length_normalised=1"],
            "objective.loss: unknown key 'length_normalised'. Possible: beta, gamma",
        ),
        (["loss=ipo"], "objective.loss = 'ipo': a mapping is expected; --loss.name ipo makes one"),
        (
            ["loss.name=ippo"],
            "objective.loss: name = 'ippo' is not a loss of the log-probs of one pair; did you mean ipo? "
            f"Possible: {', '.join(LOSS.possible())}",
        ),
        (["los.name=ipo"], "unknown setting 'los.name'; did you mean loss? Possible: loss, alignment, clamp, side,"),
    ],
)
def test_refusals(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        run(*overrides)
    assert str(error.value).startswith(message)
    assert len(str(error.value)) == len(message) or message.endswith(",")


def test_where_it_is() -> None:
    assert nested_settings(WPOConfig) == {"loss": LOSS}
    assert nested_settings(registry.find("dpo").config) == {}


def test_help_and_show_list_the_names_and_the_settings_of_the_default() -> None:
    rows = {row.flag: row for row in docs.options(WPOConfig)}
    assert list(rows) == [
        *("--loss.name", "--loss.beta", "--loss.divergence", "--loss.label_smoothing"),
        *("--alignment", "--clamp", "--side"),
    ]
    assert rows["--loss.name"].type == "|".join(LOSS.possible()) and rows["--loss.name"].default == "dpo"
    assert rows["--loss.beta"].default == "0.01" and rows["--loss.beta"].type == "number > 0"
    for words in (["show", "wpo"], ["wpo", "--help"]):
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0
        assert all(f"{flag}  " in result.stdout for flag in rows), result.stdout


def test_check_and_a_run_over_a_loss_without_reference(tmp_path: Path) -> None:
    """What the inner loss reads decides what is loaded; the folder says which loss it was."""
    saved(tmp_path / "model")
    pairs = [{"prompt": f"ab {i}?", "chosen": f"yes {i}", "rejected": f"no {i} ab"} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    words = ["--model", tmp_path / "model", "--data", tmp_path / "pairs.jsonl", "--loss.name", "simpo", "--loss.gamma", "0.2"]
    words += ["--train.max_steps", "1", "--train.output_dir", tmp_path / "out"]
    words = [str(word) for word in words]
    checked = CliRunner().invoke(main, ["check", "--objective", "wpo", *words])
    assert checked.exit_code == 0, checked.output
    assert "{'name': 'simpo', 'beta': 2.0, 'gamma': 0.2}" in checked.stdout
    trained = CliRunner().invoke(main, ["wpo", *words])
    assert trained.exit_code == 0, trained.output
    resolved = json.loads((tmp_path / "out" / "run.json").read_text())
    assert resolved["objective"]["loss"] == {"name": "simpo", "beta": 2.0, "gamma": 0.2}
    (logs, *_) = read_metrics(tmp_path / "out")
    assert 0 < logs["wpo/weight/p10"] <= logs["wpo/weight/p90"] <= logs["wpo/weight/max"] and 0 < logs["wpo/weight/ess"] <= 1
    assert "kl" not in logs
