"""Calibrated scores (InfAlign-CTRL)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from posttrain.rewards.build import scorer
from posttrain.rewards.calibration import calibrated, tilted
from posttrain.schema import UserError

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "infalign_ctrl.json").read_text())


def test_golden() -> None:
    places = calibrated(GOLDEN["inputs"]["rewards"], GOLDEN["inputs"]["reference_rewards"])
    assert places == pytest.approx(GOLDEN["outputs"]["calibrated"], abs=1e-12)
    assert tilted(places, 10) == pytest.approx(GOLDEN["outputs"]["bon_t10"], rel=1e-12)
    assert tilted(places, -10) == pytest.approx(GOLDEN["outputs"]["won_tm10"], rel=1e-12)


def test_ties_count_half() -> None:
    assert calibrated([0, 1, 2, 3], [1, 1, 2, 2]) == [0, 0.25, 0.75, 1]


def test_a_scorer_calibrated_on_samples_of_the_reference(tmp_path: Path) -> None:
    """By prompt, text or messages; the rows of the prompts go to the other scorer."""
    asked = [{"content": "why?", "role": "user"}]
    lines = [{"asked": "what?", "completions": ["a", "a b", "a b c"]}, {"asked": asked, "completions": ["1", "2"]}]
    path = tmp_path / "base.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    settings = {"name": "calibrated", "of": {"name": "length"}, "samples": str(path)}
    messages = [{"role": "user", "content": "why?"}]
    assert scorer(settings)(["what?", messages, "what?"], ["x y", "x", "x y z u"], [{}] * 3) == [0.5, 0.5, 1]
    tilt = scorer({**settings, "t": -10})(["what?"], ["x y"], [{}])
    assert tilt == pytest.approx([-math.exp(-5)])
    answers = {**settings, "of": {"name": "answer"}}
    assert scorer(answers)([messages, messages], ["2", "7"], [{"answer": "2"}] * 2) == [0.75, 0.25]
    with pytest.raises(UserError, match="has no completions of the prompt 'who"):
        scorer(settings)(["who?"], ["x"], [{}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": "nowhere.jsonl"}, "reward.samples: file nowhere.jsonl does not exist"),
        ({"of": {"name": "lenth"}}, "reward.of.name = 'lenth'; did you mean length?"),
        ({"t": 0}, "t = 0 makes all completions equal"),
    ],
)
def test_mistakes_of_settings(change: dict[str, object], message: str, tmp_path: Path) -> None:
    settings = {"name": "calibrated", "of": {"name": "length"}, "samples": str(tmp_path / "base.jsonl"), **change}
    with pytest.raises(UserError) as error:
        scorer(settings)(["what?"], ["x"], [{}])
    assert message in str(error.value)
