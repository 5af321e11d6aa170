"""`posttrain plot`: which points it draws, and what it says where it cannot."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from posttrain.cli import main
from posttrain.plots import plot, points, running
from posttrain.schema import UserError


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """A training run with three logs, of which one has no KL, and an evaluation."""
    run, evaluation = tmp_path / "run", tmp_path / "evaluation"
    run.mkdir(), evaluation.mkdir()
    logs = [{"step": 1, "reward": 0.1, "kl/sampled": 0.0}, {"step": 2, "reward": 0.5, "reward/heldout": 0.2, "kl/sampled": 1.0}]
    logs.append({"step": 2, "train_runtime": 3.0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(log) + "\n" for log in logs), encoding="utf-8")
    metrics = {"reward": 0.7, "kl/sampled": 2.0, "kl/analytic": 1.9}
    (evaluation / "evaluation.json").write_text(json.dumps({"metrics": metrics}), encoding="utf-8")
    return [run, evaluation]


def test_points(folders: list[Path], tmp_path: Path) -> None:
    assert [log.get("reward") for log in points(folders[0])] == [0.1, 0.5, None]
    assert points(folders[1]) == [{"reward": 0.7, "kl/sampled": 2.0, "kl/analytic": 1.9}]
    with pytest.raises(UserError, match=r"has neither evaluation.json \(posttrain eval\) nor metrics.jsonl"):
        points(tmp_path)


def test_running_means() -> None:
    logs = np.array([[0.0, 3.0], [1.0, 5.0], [2.0, 1.0]])
    assert running(logs).tolist() == logs.tolist()
    assert running(logs, 2).tolist() == [[0.5, 4.0], [1.5, 3.0]]
    assert running(logs, 9).tolist() == [[1.0, 3.0]]
    assert running(np.arange(40.0).reshape(20, 2))[0].tolist() == [1.0, 2.0]


def test_without_matplotlib_it_is_one_line(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    got = CliRunner().invoke(main, ["plot", str(folders[0])])
    assert got.exit_code == 2
    assert got.output == "posttrain: error: plot: matplotlib is not installed; pip install 'posttrain[plots]'\n"


def test_draws_a_png(folders: list[Path], tmp_path: Path) -> None:
    """On the KL that both have, of the logs that have it."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "plots" / "frontier.png"
    assert plot(folders, path) == {str(folders[0]): 2, str(folders[1]): 1}
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 10_000
    with pytest.raises(UserError, match="has no entropy"):
        plot(folders, path, y="entropy")
    with pytest.raises(UserError, match="has no kl/analytic"):
        plot(folders, path, x="kl/analytic")
    for wrong, says in ((path / "x.png", "File exists"), (path.with_suffix(".doc"), "Format 'doc' is not supported")):
        with pytest.raises(UserError, match=rf"plot: .*{wrong.name} cannot be written: .*{says}"):
            plot(folders, wrong)
    assert path.read_bytes() == content and [one.name for one in path.parent.iterdir()] == ["frontier.png"]
