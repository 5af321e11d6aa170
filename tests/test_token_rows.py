"""Rows of token ids: taken as they stand, cut and counted as others are."""

from __future__ import annotations

import json
from typing import Any

from reading import Write, read, refused

from posttrain.data import load
from posttrain.schema import parse
from posttrain.settings import DataConfig


def test_ids_stay_as_they_are(write: Write, tokenizer: Any) -> None:
    """No template, no leading token, and no end token behind a completion that was cut off."""
    rows = [
        {"prompt": [9, 8], "chosen": [7, 4], "rejected": [6, 5], "won": 0.75},
        {"prompt": [9], "chosen": [7], "rejected": [7, 6], "won": 1},
    ]
    loaded = read(tokenizer, numbers=["won"], name=write(*rows))
    assert "token ids, as they stand" in str(loaded.report)
    assert list(loaded.train) == [
        {"prompt": [9, 8], "chosen": [[7, 4]], "rejected": [[6, 5]], "won": 0.75},
        {"prompt": [9], "chosen": [[7]], "rejected": [[7, 6]], "won": 1.0},
    ]


def test_prompts_and_labels(write: Write, tokenizer: Any) -> None:
    path = write({"prompt": [9, 8], "chosen": [7], "rejected": [6]})
    assert list(read(tokenizer, [], name=path).train) == [{"prompt": [9, 8]}]
    unpaired = read(tokenizer, ["completion"], ["label"], name=path, unpair=True).train
    assert [(row["completion"], row["label"]) for row in unpaired] == [([[7]], 1.0), ([[6]], 0.0)]


def test_rows_are_cut_and_counted(write: Write, tokenizer: Any) -> None:
    rows = [
        {"prompt": [9] * 6, "chosen": [7], "rejected": [6, 5]},
        {"prompt": [9], "chosen": [7], "rejected": [7]},
        {"prompt": [9], "chosen": [], "rejected": [7]},
        {"prompt": [9], "chosen": [7], "rejected": [8]},
    ]
    outcomes = read(tokenizer, name=write(*rows), max_length=7).report.train[0].outcomes
    assert outcomes == {"too long": 1, "identical": 1, "empty completion": 1, "kept": 1}
    cut = read(tokenizer, name=write(*rows), max_length=7, too_long="truncate_prompt").train
    assert cut[0] == {"prompt": [9] * 5, "chosen": [[7]], "rejected": [[6, 5]]}


def test_mistakes_are_one_line(write: Write, tokenizer: Any) -> None:
    good = {"prompt": [9], "chosen": [7], "rejected": [8]}
    assert "row 2: column 'chosen' holds a list, expected a list of token ids" in refused(
        tokenizer, name=write(good, {**good, "chosen": [-7]})
    )
    assert "rows of token ids are taken as they stand" in refused(tokenizer, name=write(good), format="plain")


def test_rows_as_they_were_stored_come_along_where_asked(write: Write, tokenizer: Any) -> None:
    """For scorers, which read messages and columns; of token ids the prompt is decoded."""
    settings = parse(DataConfig, {"name": write({"prompt": "why?", "answer": 7})}, "data")
    (row,) = load(settings, tokenizer, (), source=True).train
    assert json.loads(row["source"]) == {
        "prompt": [{"role": "user", "content": "why?"}],
        "row": {"prompt": "why?", "answer": 7},
    }
    settings = parse(DataConfig, {"name": write({"prompt": row["prompt"], "answer": 8})}, "data")
    (again,) = load(settings, tokenizer, (), source=True).train
    assert again["prompt"] == row["prompt"]
    assert json.loads(again["source"])["prompt"] == tokenizer.decode(row["prompt"])
