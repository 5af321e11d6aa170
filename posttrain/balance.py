"""The rows of an optimizer step dealt to its micro-batches and processes by their lengths.

The loss of a step is a mean over all of its rows, so who computes which of them changes it by rounding alone; but all processes
wait for the one that has the most to compute. Which rows a step has stays as it is.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from .mismatch import Mismatched
from .trees import Collator

_AT_ONCE = 10_000
"""Rows of a table whose ids are in memory together."""


def even(loads: Sequence[int] | np.ndarray, parts: int) -> list[list[int]]:
    """Deal loads so that the largest total is small: the largest first, each to the smallest total that has room for it.

    Args:
        loads: [n] what each weighs.
        parts: how many share them; room is for n / parts each, rounded up.

    Returns:
        For each part the numbers of its loads, the largest first. Of equal loads and totals the first comes first.
    """
    loads = np.asarray(loads, dtype=np.int64)
    room = -(-len(loads) // parts)
    found: list[list[int]] = [[] for _ in range(parts)]
    totals = [(0, part) for part in range(parts)]  # a heap
    for number in np.argsort(-loads, kind="stable").tolist():
        total, part = heapq.heappop(totals)
        found[part].append(number)
        if len(found[part]) < room:
            heapq.heappush(totals, (total + int(loads[number]), part))
    return found


@dataclass(frozen=True)
class ByLength:
    """Deals the rows of a step: `deal(rows, batch_size, processes) -> micro-batches`, the same on every process.

    Where trees are packed into rows, all micro-batches get as many tokens as can be. Where every sequence is filled up to the
    longest of its micro-batch, rows of like length share one. Then processes get micro-batches with equal totals. What shares a
    micro-batch depends on its size, not on how many processes there are.
    """

    tokens: np.ndarray
    """[rows] of each row of the data; see `tokens_of`."""

    collate: Collator
    """Knows the layout when the first batch is dealt."""

    def __call__(self, rows: Sequence[int], batch_size: int, processes: int) -> list[list[int]]:
        """Turn after turn one micro-batch for each process, in the order of `rows`; a process may have none in the last turn.

        Args:
            rows: numbers of the step's rows.
            batch_size: rows of a micro-batch at most.
            processes: how many share the micro-batches.
        """
        loads = self.tokens[np.asarray(rows, dtype=np.int64)]
        count = -(-len(rows) // batch_size)
        if self.collate.layout == "tree":
            groups = even(loads, count)
        else:
            order = np.argsort(-loads, kind="stable").tolist()
            groups = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        shares = even([int(loads[group].sum()) for group in groups], processes)
        turns = range(-(-count // processes))
        chosen = [groups[share[turn]] if turn < len(share) else [] for turn in turns for share in shares]
        return [[rows[at] for at in sorted(group)] for group in chosen]


def tokens_of(rows: Any, roles: Sequence[str]) -> np.ndarray:
    """The tokens of each tree: its prompt and its completions.

    Args:
        rows: a table of rows; one of `datasets` is read by columns.
        roles: the completions that are trained on.

    Returns:
        [rows] int64.
    """
    if isinstance(rows, Mismatched):
        rows = rows.rows
    if not isinstance(rows, Dataset):
        trees = (rows[number] for number in range(len(rows)))
        sizes = [len(row["prompt"]) + sum(len(one) for role in roles for one in row[role]) for row in trees]
        return np.array(sizes, dtype=np.int64)
    parts = [np.empty(0, dtype=np.int64)]
    for batch in rows.select_columns(["prompt", *roles]).with_format("arrow").iter(batch_size=_AT_ONCE):
        sizes = batch["prompt"].combine_chunks().value_lengths().to_numpy().astype(np.int64)
        for role in roles:
            sides = batch[role].combine_chunks()
            owners, lengths = sides.value_parent_indices().to_numpy(), sides.flatten().value_lengths().to_numpy()
            np.add.at(sizes, owners, lengths)
        parts.append(sizes)
    return np.concatenate(parts)
