"""Mismatched completions: who lends to whom, in tables and in streams."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from datasets import Dataset
from golden import golden
from hypothesis import given
from hypothesis import strategies as st

from posttrain.mismatch import Mismatched, MismatchedStream, early_roles, lenders, with_mismatches
from posttrain.registry import find
from posttrain.schema import UserError

prompts = st.lists(st.integers(0, 9), min_size=2, max_size=60).filter(lambda found: len(set(found)) > 1)
"""A row's prompt each, by number."""

ROLES = {"mismatched": "completion"}


def rows(numbers: list[int]) -> list[dict[str, object]]:
    """Rows with these prompts; completion i is the token i, i % 4 + 1 times."""
    return [{"prompt": [number, 7], "completion": [[i] * (i % 4 + 1)], "label": 1.0} for i, number in enumerate(numbers)]


def borrowed(rows: object) -> list[int]:
    """Of each row, the number of the row that lent."""
    return [row["mismatched"][0][0] for row in rows]


@given(prompts, st.integers(0, 3))
def test_no_row_meets_its_own_prompt(numbers: list[int], seed: int) -> None:
    lender = lenders([[number] for number in numbers], seed, "data")
    assert all(numbers[other] != number for number, other in zip(numbers, lender, strict=True))
    assert (lender == lenders([[number] for number in numbers], seed, "data")).all()


@given(prompts)
def test_every_row_lends_once_where_no_prompt_has_more_than_half(numbers: list[int]) -> None:
    lender = lenders([[number] for number in numbers], 0, "data")
    lent = np.bincount(lender, minlength=len(numbers))
    if max(numbers.count(number) for number in numbers) * 2 <= len(numbers):
        assert (lent == 1).all()
    else:
        minority = [lent[i] for i, number in enumerate(numbers) if numbers.count(number) * 2 <= len(numbers)]
        assert max(minority) - min(minority) <= 1


def test_the_seed_decides() -> None:
    asked = [[number] for number in range(100)]
    assert (lenders(asked, 0, "data") != lenders(asked, 1, "data")).sum() > 90


def test_prompts_that_begin_alike_are_different() -> None:
    assert lenders([[1], [1, 1]], 0, "data").tolist() == [1, 0]


def test_released_pairings_of_five_rows() -> None:
    """HALOs and TRL rotate the batch, so that every row lends once; TRL once reversed it, and the middle row met itself."""
    official = golden("kto_mismatch_indices").outputs
    five = range(5)
    for name in ("halos", "trl"):
        assert sorted(official[name]) == [*five] and all(official[name][i] != i for i in five)
    assert official["old_trl_reversed"][2] == 2
    ours = lenders([[i] for i in five], 0, "data").tolist()
    assert sorted(ours) == [*five] and all(ours[i] != i for i in five)
    assert borrowed(MismatchedStream(rows([*five]), ROLES, 100, "data"))[1:] == official["trl"][1:]


def test_one_prompt_is_refused() -> None:
    with pytest.raises(UserError, match=r"^data: all 3 rows have the same prompt; this method needs completions for other"):
        lenders([[5, 6]] * 3, 0, "data")


def test_a_table_is_read_by_number_and_in_order() -> None:
    table = Dataset.from_list(rows([0, 1, 0, 2]))
    paired = with_mismatches(table, ROLES, seed=0, max_length=4, where="data")
    assert isinstance(paired, Mismatched) and len(paired) == 4
    assert [row["completion"] for row in paired] == table["completion"][:]
    assert sorted(borrowed(paired)) == [0, 1, 2, 3]
    assert paired[2]["mismatched"][0][0] == borrowed(paired)[2]


def test_what_is_borrowed_is_cut_to_the_length_of_a_row() -> None:
    """Prompts have 2 tokens; of a completion of 4 there is room for max_length - 2."""
    paired = with_mismatches(Dataset.from_list(rows([0, 1, 2, 3])), ROLES, seed=0, max_length=5, where="data")
    lengths = {row["mismatched"][0][0]: len(row["mismatched"][0]) for row in paired}
    assert lengths == {0: 1, 1: 2, 2: 3, 3: 3}


@given(prompts)
def test_a_stream_borrows_from_the_last_other_prompt(numbers: list[int]) -> None:
    found = list(MismatchedStream(rows(numbers), ROLES, 100, "data"))
    assert [row["completion"] for row in found] == [row["completion"] for row in rows(numbers)]
    change = next(i for i, (one, other) in enumerate(pairwise(numbers), start=1) if one != other)
    for i, lender in enumerate(borrowed(found)):
        before = [j for j in range(i) if numbers[j] != numbers[i]]
        assert lender == (before[-1] if before else change)


def test_a_stream_begins_anew_every_epoch_and_takes_its_number() -> None:
    stream = Dataset.from_list(rows([0, 0, 1, 2, 2])).to_iterable_dataset().shuffle(seed=0, buffer_size=5)
    paired = with_mismatches(stream, ROLES, seed=0, max_length=100, where="data")
    first = borrowed(paired)
    assert borrowed(paired) == first
    orders = set()
    for epoch in range(5):
        paired.set_epoch(epoch)
        orders.add(tuple(borrowed(paired)))
    assert tuple(first) in orders and len(orders) > 1


def test_a_stream_of_one_prompt_is_refused_at_its_end() -> None:
    with pytest.raises(UserError, match="all 2 rows of the stream have the same prompt"):
        list(MismatchedStream(rows([3, 3]), ROLES, 100, "data"))


def test_only_an_objective_that_looks_before_the_step_borrows() -> None:
    assert early_roles(find("kto")) == ROLES
    assert early_roles(find("apo_zero_unpaired")) == {}
    assert early_roles(find("dpo")) == {}
