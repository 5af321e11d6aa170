"""What in the benchmarks decides about the numbers they print."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
import torch

from benchmarks import balance, isolated, material, step
from benchmarks.kernel import Peak


def test_mismatched_completions_are_those_of_the_row_before_in_the_batch() -> None:
    rows = [{"prompt": [i], "chosen": [[10 + i, 1]], "rejected": [[20 + i, 1]]} for i in range(6)]
    rows[4]["prompt"] = [4] * 9
    got = material.labelled(rows, argparse.Namespace(batch=3, max_length=10))
    assert [row["completion"][0][0] for row in got] == [10, 21, 12, 23, 14, 25]
    assert [row["mismatched"] for row in got] == [[[12, 1]], [[10, 1]], [[21, 1]], [[25, 1]], [[23]], [[14, 1]]]
    assert [row["label"] for row in got] == [1, 0, 1, 0, 1, 0]


def test_advantages_are_centred_and_scaled() -> None:
    rewards = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0])
    want = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    assert material.advantages(rewards.tolist()) == pytest.approx(want.tolist())


def test_a_sweep_can_be_split_and_its_table_takes_ratios_to_the_first_side(tmp_path, monkeypatch, capsys) -> None:
    def run(side: str) -> dict:
        ours = side == "ours"
        seconds, losses = ([1.0, 2.0, 9.0], [0.5, 0.25]) if ours else ([4.0], [0.5, 0.2])
        return {"seconds": seconds, "positions": [10], "peak": 2**30, "losses": losses, "norms": [1.0, 1.0]}

    monkeypatch.setattr(isolated, "isolated", lambda module, job: run(job))
    output = str(tmp_path / "runs" / "results.json")
    for side in ("trl", "ours"):
        isolated.sweep("any", [(f"dpo {side}", side)], step.table, output, add=True)
    assert list(json.loads((tmp_path / "runs" / "results.json").read_text())) == ["dpo trl", "dpo ours"]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "| dpo | posttrain | 2.00 | 0.50 | 10 | 1.00 | 1.00 | 1.00 | 2.0e-01 | 0.0e+00 |"


def test_the_peak_is_what_a_call_adds_each_time() -> None:
    for _ in range(2):
        with Peak("cpu") as peak:
            torch.ones(4 << 20)  # 16 MiB, freed at once
        assert 15 << 20 < peak.bytes < 24 << 20


def test_what_the_most_loaded_process_computes() -> None:
    assert balance.filled(np.array([[3, 5], [9, 2], [4, 4]]), [0, 2]) == 5 * 2 * 2
    rows = np.array([[4]] * 4 + [[2]] * 4)
    assert balance.shares(rows, "tree", True, processes=2, batch=4, accumulation=1) == pytest.approx([1])
    assert balance.least(rows, processes=8, batch=1, accumulation=1) == pytest.approx(4 / 3)
    same = np.full((8, 2), 3)
    assert balance.shares(same, "separate", False, processes=2, batch=1, accumulation=2) == pytest.approx([1, 1])
