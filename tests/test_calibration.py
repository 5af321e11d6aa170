"""Calibrated scores (InfAlign-CTRL)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posttrain.rewards.calibration import calibrated, tilted

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "infalign_ctrl.json").read_text())


def test_golden() -> None:
    places = calibrated(GOLDEN["inputs"]["rewards"], GOLDEN["inputs"]["reference_rewards"])
    assert places == pytest.approx(GOLDEN["outputs"]["calibrated"], abs=1e-12)
    assert tilted(places, 10) == pytest.approx(GOLDEN["outputs"]["bon_t10"], rel=1e-12)
    assert tilted(places, -10) == pytest.approx(GOLDEN["outputs"]["won_tm10"], rel=1e-12)


def test_ties_count_half() -> None:
    assert calibrated([0, 1, 2, 3], [1, 1, 2, 2]) == [0, 0.25, 0.75, 1]
