"""Mismatched completions: beside every row's own completion one of another row, with another prompt.

What a policy makes of them estimates its divergence from the reference (KTO's z0). Which row lends depends on the data set and
a seed, not on the batch: so rows shuffle, any batch size and number of processes works, and no row meets its own prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset

from .registry import Objective
from .schema import UserError
from .stats import early_roles_of

Row = Mapping[str, Any]


def early_roles(objective: Objective) -> dict[str, str]:
    """The completions an objective reads only before a step -> the role they are taken from; none without a `before`."""
    return early_roles_of(objective.family) if objective.before is not None else {}


def lenders(prompts: Iterable[Sequence[int]], seed: int, where: str) -> np.ndarray:
    """For each row the number of another one with another prompt.

    Rows are sorted by prompt, prompts and rows of one prompt in random order, the commonest prompt first, and each borrows from
    the row as many places on as that prompt has rows. So every row lends exactly once, unless one prompt has more than half
    of the rows; then the others lend to it in turn.

    Args:
        prompts: ids of each row's prompt.
        seed: of the order.
        where: how the error calls the data set.

    Returns:
        [rows] int64.

    Raises:
        UserError: all prompts are the same.
    """
    numbers: dict[bytes, int] = {}
    prompt = np.array([numbers.setdefault(np.asarray(ids, dtype=np.int32).tobytes(), len(numbers)) for ids in prompts])
    if len(numbers) < 2:
        raise UserError(_one_prompt(where, f"all {len(prompt)} rows"))
    generator = np.random.default_rng(seed)
    sizes = np.bincount(prompt)
    rank = generator.permutation(len(sizes))
    rank[sizes.argmax()] = -1
    order = np.lexsort((generator.permutation(len(prompt)), rank[prompt]))
    rows, most = len(order), sizes.max()
    place = np.arange(rows)
    lender = np.empty(rows, dtype=np.int64)
    lender[order] = order[np.where(place < most, most + place % (rows - most), (place + most) % rows)]
    return lender


def with_mismatches(
    rows: Dataset | IterableDataset, roles: Mapping[str, str], *, seed: int, max_length: int, where: str
) -> Mismatched | MismatchedStream:
    """Rows with the completions of other rows beside their own.

    Args:
        rows: tokenised rows.
        roles: new role -> the role it is taken from.
        seed: of the choice; of a stream the last row with another prompt lends.
        max_length: tokens of prompt and completion together, beyond which a borrowed completion is cut.
        where: how errors call the data set.

    Raises:
        UserError: all prompts are the same.
    """
    if isinstance(rows, IterableDataset):
        return MismatchedStream(rows, roles, max_length, where)
    batches = rows.select_columns("prompt").with_format("arrow").iter(batch_size=1000)  # 40 times as fast as row by row
    prompts = (ids for batch in batches for ids in batch["prompt"].to_numpy())
    return Mismatched(rows, lenders(prompts, seed, where), roles, max_length)


class Mismatched(torch.utils.data.Dataset):
    """Rows of a table, each with what it borrows."""

    def __init__(self, rows: Sequence[Row], lender: Sequence[int], roles: Mapping[str, str], max_length: int) -> None:
        self.rows, self.lender, self.roles, self.max_length = rows, lender, roles, max_length

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return _with(self.rows[number], self.rows[int(self.lender[number])], self.roles, self.max_length)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[number] for number in range(len(self)))


class MismatchedStream(torch.utils.data.IterableDataset):
    """Rows of a stream, each with what it borrows from the last one with another prompt (the first ones: from the next)."""

    def __init__(self, rows: IterableDataset, roles: Mapping[str, str], max_length: int, where: str) -> None:
        self.rows, self.roles, self.max_length, self.where = rows, roles, max_length, where

    def __iter__(self) -> Iterator[dict[str, Any]]:
        last, other, waiting = None, None, []
        for row in self.rows:
            if last is not None and row["prompt"] != last["prompt"]:
                other = last
                yield from (_with(one, row, self.roles, self.max_length) for one in waiting)
                waiting = []
            last = row
            if other is None:
                waiting.append(row)
            else:
                yield _with(row, other, self.roles, self.max_length)
        if waiting:
            raise UserError(_one_prompt(self.where, f"all {len(waiting)} rows of the stream"))

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew."""
        self.rows.set_epoch(epoch)


def _with(row: Row, lender: Row, roles: Mapping[str, str], max_length: int) -> dict[str, Any]:
    room = max_length - len(row["prompt"])
    return {**row, **{new: [completion[:room] for completion in lender[role]] for new, role in roles.items()}}


def _one_prompt(where: str, which: str) -> str:
    return f"{where}: {which} have the same prompt; this method needs completions for other prompts to compare with"
