"""Labels, and pairs taken apart into labelled rows."""

from __future__ import annotations

from typing import Any

import pytest
from reading import Write, read, refused

KTO = (("completion",), ("label",))


def labelled(write: Write, *labels: Any) -> str:
    return write(*({"prompt": f"why {i}?", "completion": f"so {i}", "label": label} for i, label in enumerate(labels)))


@pytest.mark.parametrize(
    "labels", [(True, False), (1, 0), (1.0, 0.0), ("desirable", "undesirable"), ("True", "false"), ("1", "0")]
)
def test_labels(labels: tuple[Any, Any], write: Write, tokenizer: Any) -> None:
    assert read(tokenizer, *KTO, name=labelled(write, *labels)).train["label"][:] == [1.0, 0.0]


@pytest.mark.parametrize("label", ["good", -1, 0.5, None])
def test_other_labels_are_refused_with_their_row(label: Any, write: Write, tokenizer: Any) -> None:
    path = labelled(write, *(("desirable", label) if isinstance(label, str) else (1, label)))
    got = f"{float(label)}" if isinstance(label, float) else repr(label)
    assert refused(tokenizer, *KTO, name=path) == (
        f"data {path}: row 2: column 'label' holds {got}, expected true, false, 1, 0, desirable or undesirable"
    )


PAIRS = (
    {"prompt": "a?", "chosen": "yes", "rejected": "no"},
    {"prompt": "b?", "chosen": "same", "rejected": "same"},
    {"prompt": "c?", "chosen": "so", "rejected": "nor"},
)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_pair_becomes_two_rows(streaming: bool, write: Write, tokenizer: Any) -> None:
    more = {"streaming": True, "shuffle_buffer": 0} if streaming else {}
    loaded = read(tokenizer, *KTO, name=write(*PAIRS), unpair=True, **more)
    found = [(tokenizer.decode(row["completion"][0]), row["label"]) for row in loaded.train]
    assert found == [("yes<|im_end|>", 1.0), ("no<|im_end|>", 0.0), ("so<|im_end|>", 1.0), ("nor<|im_end|>", 0.0)]
    assert all("a?" in tokenizer.decode(row["prompt"]) for row in list(loaded.train)[:2])
    assert loaded.report.train[0].dropped == {"identical": 1}
    assert loaded.report.train_rows == (None if streaming else 4)


def test_both_rows_of_a_pair_are_held_out_together(write: Write, tokenizer: Any) -> None:
    loaded = read(tokenizer, *KTO, name=write(*PAIRS), unpair=True, eval_size=1)
    assert loaded.report.eval_rows == len(loaded.eval) == 2
    assert loaded.report.train_rows == len(loaded.train) == 2
    assert len({tuple(row["prompt"]) for row in loaded.eval}) == 1


def test_pairs_name_the_setting(write: Write, tokenizer: Any) -> None:
    line = refused(tokenizer, *KTO, name=write(*PAIRS))
    assert line.endswith("name one with --data.columns.completion <column>, or take the pairs apart with --data.unpair true")


def test_a_method_of_pairs_takes_none_apart(write: Write, tokenizer: Any) -> None:
    line = refused(tokenizer, name=write(*PAIRS), unpair=True)
    assert line == "data: unpair = true makes rows of completion and label; this method reads chosen, rejected"
