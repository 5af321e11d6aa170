"""An epoch over several processes: every row once, as many batches for each, and batches without rows."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import IterableDataset, SequentialSampler
from transformers import TrainingArguments

from posttrain.loading import Dealt, EvenBatches, loader
from posttrain.trees import Collator, TreeCollator

counts = st.integers(1, 5)


def steps(per_process: list[list[list[int | None]]]) -> list[list[int]]:
    """The rows of every global batch, in order; every process has as many batches as the others."""
    assert len({len(batches) for batches in per_process}) == 1
    return [[row for batch in at for row in batch if row is not None] for at in zip(*per_process, strict=True)]


def expected(rows: int, whole: int) -> list[list[int]]:
    return [list(range(start, min(start + whole, rows))) for start in range(0, rows, whole)]


@given(rows=st.integers(1, 40), size=counts, processes=counts)
def test_a_table_is_dealt_as_one_process_reads_it(rows: int, size: int, processes: int) -> None:
    batches = EvenBatches(SequentialSampler(range(rows)), size, processes)
    dealt = list(batches)
    assert len(dealt) == len(batches) and all(len(batch) == size for batch in dealt)
    assert steps([dealt[index::processes] for index in range(processes)]) == expected(rows, size * processes)


@given(rows=st.integers(1, 40), size=counts, processes=counts)
def test_a_stream_is_dealt_as_a_table_is(rows: int, size: int, processes: int) -> None:
    mine = [list(Dealt(range(rows), size, processes, index, drop_last=False)) for index in range(processes)]
    cut = [[rows[at : at + size] for at in range(0, len(rows), size)] for rows in mine]
    assert steps(cut) == expected(rows, size * processes)
    whole = [list(Dealt(range(rows), size, processes, index, drop_last=True)) for index in range(processes)]
    assert sorted(row for mine in whole for row in mine) == list(range(rows // (size * processes) * size * processes))


class Stream(IterableDataset):
    """Rows whose order depends on the epoch."""

    epoch = 0

    def __iter__(self):
        return iter(range(self.epoch, 7 + self.epoch))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders(tmp_path, workers: int) -> None:
    args = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=2, dataloader_num_workers=workers, report_to=[]
    )
    accelerator = Accelerator(cpu=True)
    table = loader(list(range(7)), lambda rows: list(rows), args, accelerator, training=True)
    assert len(table) == 4
    first, second = (sorted(row for batch in table for row in batch if row is not None) for _ in range(2))
    assert first == second == list(range(7))
    ordered = loader(list(range(7)), lambda rows: list(rows), args, accelerator, training=False)
    assert next(iter(ordered)) == [*range(7), None]
    if not workers:
        stream = loader(Stream(), lambda rows: list(rows), args, accelerator, training=True)
        stream.set_epoch(3)
        assert list(stream) == [[3, 4], [5, 6], [7, 8], [9, None]]


def test_an_incomplete_batch_is_dropped_on_request(tmp_path) -> None:
    args = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=2, dataloader_drop_last=True, report_to=[]
    )
    dropping = loader(list(range(7)), lambda rows: list(rows), args, Accelerator(cpu=True), training=True)
    assert len(dropping) == 3 and sorted(row for batch in dropping for row in batch)[0] is not None


@pytest.mark.parametrize("layout", ["tree", "separate"])
def test_fillers_leave_no_trace(layout: str) -> None:
    def lookup(prompt, completion):
        return {"reference_logps": np.full(len(completion), 0.5, dtype=np.float32)}

    row = {"prompt": [5, 6], "chosen": [[7, 8]], "rejected": [[9]], "label": 1}
    main = TreeCollator(("chosen", "rejected"), ("label",), layout=layout, reference=lookup)
    collate = Collator(main, dataclasses.replace(main, roles=("chosen",)), both=main)
    alone, among = collate([row]), collate([None, row, None])
    assert alone.keys() == among.keys() and all(torch.equal(alone[name], among[name]) for name in alone)
    none = collate([None, None])
    assert none.keys() == alone.keys()
    for name, tensor in none.items():
        shared = name.removeprefix("early.").removeprefix("both.") in ("input_ids", "position_ids", "tree", "branch")
        assert tensor.shape == ((1, 1) if shared else (0,)), name
        assert tensor.dtype == alone[name].dtype or name.endswith("row.label"), name
    assert none["tree"].item() == 1  # a token that attends to itself, not padding, which some models make nan of


def test_collator_takes_no_rows_that_are_empty() -> None:
    with pytest.raises(AssertionError, match="an empty prompt"):
        TreeCollator(("chosen",))([SimpleNamespace(prompt=[]).__dict__ | {"chosen": [[1]]}])
