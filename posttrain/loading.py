"""An epoch dealt to the processes of a run: every row once, to each process as many batches as to the others.

Where rows run out, fillers (None) complete the batches, and the collator leaves them out again. So a batch may have fewer rows
than the others, or none; a process that gets one still takes part in everything that the processes do together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, Sampler, SequentialSampler
from transformers import TrainingArguments

from .sources import readable


class Filled(Dataset):
    """A table of rows that also has a filler, under None."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int | None) -> Any:
        return None if number is None else self.rows[number]


class EvenBatches(BatchSampler):
    """Batches of the numbers that a sampler gives, filled up to whole ones, and their number to a multiple of the processes."""

    def __init__(self, sampler: Sampler, batch_size: int, processes: int) -> None:
        super().__init__(sampler, batch_size, drop_last=False)
        self.processes = processes

    def __len__(self) -> int:
        return -(-super().__len__() // self.processes) * self.processes

    def __iter__(self) -> Iterator[list[int | None]]:
        for batch in super().__iter__():
            yield [*batch, *[None] * (self.batch_size - len(batch))]
        yield from [[None] * self.batch_size for _ in range(len(self) - super().__len__())]


class Dealt(IterableDataset):
    """One process's rows of a stream, which every process reads: batch after batch goes to one after the other.

    Args:
        rows: the stream.
        batch_size: rows of a batch.
        processes, index: how many share the stream, and which of them this is.
        drop_last: leave out what does not fill a batch of every process.
    """

    def __init__(self, rows: Any, batch_size: int, processes: int, index: int, drop_last: bool) -> None:
        self.rows, self.batch_size, self.processes, self.index = rows, batch_size, processes, index
        self.drop_last = drop_last

    def __iter__(self) -> Iterator[Any]:
        rows, whole = iter(self.rows), self.batch_size * self.processes
        while block := self._next(rows, whole):
            if len(block) < whole and self.drop_last:
                return
            mine = block[self.index * self.batch_size : (self.index + 1) * self.batch_size]
            yield from [*mine, *[None] * (self.batch_size - len(mine))]

    @staticmethod
    def _next(rows: Iterator[Any], count: int) -> list[Any]:
        with readable("data: a stream broke off"):
            return list(itertools.islice(rows, count))

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew."""
        self.rows.set_epoch(epoch)


def loader(
    rows: Any,
    collate: Callable[[Sequence[Any]], Any],
    args: TrainingArguments,
    accelerator: Accelerator,
    *,
    training: bool,
) -> DataLoader:
    """The batches of this process, on its device.

    Args:
        rows: a table of rows, or a stream.
        collate: rows, among them fillers -> batch.
        args: batch sizes and how to load.
        accelerator: knows the processes.
        training: in the order of `train_sampling_strategy`, with `dataloader_drop_last`; else in that of the rows, all of them.
    """
    size = args.train_batch_size if training else args.eval_batch_size
    drop_last = training and args.dataloader_drop_last
    settings = {
        "collate_fn": collate,
        "num_workers": args.dataloader_num_workers,
        "pin_memory": args.dataloader_pin_memory,
        "persistent_workers": training and args.dataloader_persistent_workers,
        "multiprocessing_context": args.dataloader_multiprocessing_context,
        "prefetch_factor": args.dataloader_prefetch_factor,
        "in_order": args.dataloader_in_order,
    }
    if isinstance(rows, IterableDataset):  # those of `datasets` are, too
        mine = Dealt(rows, size, accelerator.num_processes, accelerator.process_index, drop_last)
        return prepare_data_loader(  # told of one process, it does not deal again
            DataLoader(mine, batch_size=size, **settings),
            device=accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
        )
    table = Filled(rows)
    shuffled = training and args.train_sampling_strategy == "random"
    sampler = RandomSampler(table) if shuffled else SequentialSampler(table)
    batches = (
        BatchSampler(sampler, size, drop_last=True) if drop_last else EvenBatches(sampler, size, accelerator.num_processes)
    )
    return accelerator.prepare_data_loader(DataLoader(table, batch_sampler=batches, **settings))
