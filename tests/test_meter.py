"""Metrics are reduced as their names say, however the observations are split."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from posttrain.meter import Meter

VALUES = [0.5, 4.0, 1.0, 2.0, 0.0]


def reduced(name: str, *parts: list[float]) -> dict[str, float]:
    meter = Meter()
    for part in parts:
        meter.add({name: torch.tensor(part)})
    return meter.reduce(Accelerator(cpu=True))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("w", 1.5),
        ("w/sum", 7.5),
        ("w/max", 4.0),
        ("w/min", 0.0),
        ("w/p50", 1.0),
        ("w/p25", 0.5),
        ("w/p90", 3.2),  # three fifths of the way from 2.0, which is at 75%, to 4.0
        ("w/ess", 7.5**2 / (0.25 + 16 + 1 + 4) / 5),
    ],
)
@pytest.mark.parametrize("cuts", [[5], [1, 4], [2, 0, 3]])
def test_endings(name: str, expected: float, cuts: list[int]) -> None:
    parts, rest = [], VALUES
    for size in cuts:
        parts.append(rest[:size])
        rest = rest[size:]
    assert reduced(name, *parts) == {name: pytest.approx(expected, abs=1e-12)}


@pytest.mark.parametrize("name", ["w", "w/sum", "w/max", "w/min", "w/p50", "w/ess"])
def test_what_nobody_saw_is_left_out(name: str) -> None:
    assert reduced(name, [], []) == {}


def test_the_order_is_that_of_the_metrics() -> None:
    meter = Meter()
    meter.add({"b/max": torch.ones(1), "c": torch.ones(1), "a/p10": torch.ones(1)})
    assert list(meter.reduce(Accelerator(cpu=True))) == ["b/max", "c", "a/p10"]
