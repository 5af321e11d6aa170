"""An epoch dealt to the processes of a run: every row once, to each process as many batches as to the others.

Where rows run out, fillers (None) complete the batches, and the collator leaves them out again. So a batch may have fewer rows
than the others, or none; a process that gets one still takes part in everything that the processes do together. Who gets which
rows of an optimizer step is free; balance.py chooses by length.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
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


Deal = Callable[[Sequence[int], int, int], list[list[int]]]
"""(rows of a step, rows of a batch, processes) -> batches, turn after turn one for each process; the last ones may lack."""


def by_position(rows: Sequence[int], batch_size: int, processes: int) -> list[list[int]]:
    """Rows as they come, cut into batches."""
    return [list(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]


class EvenBatches(BatchSampler):
    """Batches of the numbers that a sampler gives, filled up to whole ones, and their number to a multiple of the processes.

    Args:
        sampler: gives the numbers.
        batch_size: numbers of a batch.
        processes: how many take batches in turn.
        accumulation: batches of a step, on each process.
        drop_last: leave out what does not fill a batch of every process.
        deal: shares the numbers of a step out.
    """

    def __init__(
        self,
        sampler: Sampler,
        batch_size: int,
        processes: int,
        *,
        accumulation: int = 1,
        drop_last: bool = False,
        deal: Deal = by_position,
    ) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.processes, self.accumulation, self.deal = processes, accumulation, deal

    def __len__(self) -> int:
        whole = self.batch_size * self.processes
        turns = len(self.sampler) // whole if self.drop_last else -(-len(self.sampler) // whole)
        return turns * self.processes

    def __iter__(self) -> Iterator[list[int | None]]:
        numbers, whole = list(self.sampler), self.batch_size * self.processes
        if self.drop_last:
            numbers = numbers[: len(numbers) // whole * whole]
        for start in range(0, len(numbers), self.accumulation * whole):
            batches = self.deal(numbers[start : start + self.accumulation * whole], self.batch_size, self.processes)
            batches += [[] for _ in range(-len(batches) % self.processes)]
            yield from ([*batch, *[None] * (self.batch_size - len(batch))] for batch in batches)


@dataclass(frozen=True)
class Plan:
    """How an epoch is cut into rounds, for rows that become training data only when a model has written something to them.

    A round takes the rows of `every` optimizer steps and is learned from `epochs` times over. All of its rows come with the
    micro-batches of its first step, so that they can be sampled at once; its other steps get fillers.
    """

    batch_size: int
    """Rows of a micro-batch."""

    accumulation: int
    """Micro-batches of a step, on each process."""

    processes: int
    """How many share the rows."""

    every: int
    """Steps whose rows are a round's; the last round of an epoch may have fewer."""

    epochs: int
    """How often they are learned from."""

    drop_last: bool = False
    """Leave out rows that do not fill a step."""

    @property
    def step(self) -> int:
        """Rows of a step."""
        return self.batch_size * self.accumulation * self.processes

    def steps(self, rows: int) -> int:
        """Steps of one pass over so many rows."""
        return rows // self.step if self.drop_last else -(-rows // self.step)

    def place(self, step: int, micro: int, process: int, row: int) -> int:
        """The number within its round of a row, by its step in the round, its micro-batch, its process and its place there."""
        return step * self.step + (micro * self.processes + process) * self.batch_size + row

    def batches(self, rows: Iterable[Any]) -> Iterator[list[Any]]:
        """Batches of `every * batch_size`, one process's after the other's; in each the rows of step after step, or None."""
        rows, size = iter(rows), self.every * self.step
        while block := list(itertools.islice(rows, size)):
            steps = self.steps(len(block))
            block = block[: steps * self.step] if self.drop_last else block
            block += [None] * (size - len(block))
            for micro, process in itertools.product(range(self.accumulation if steps else 0), range(self.processes)):
                starts = [self.place(step, micro, process, 0) for step in range(self.every)]
                yield [row for start in starts for row in block[start : start + self.batch_size]]
            for _ in range((steps * self.epochs - 1) * self.accumulation * self.processes):
                yield [None] * (self.every * self.batch_size)


class Rounds(BatchSampler):
    """The numbers that a sampler gives, dealt by a plan."""

    def __init__(self, sampler: Sampler, plan: Plan) -> None:
        super().__init__(sampler, plan.every * plan.batch_size, drop_last=False)
        self.plan = plan

    def __len__(self) -> int:
        return self.plan.steps(len(self.sampler)) * self.plan.epochs * self.plan.accumulation * self.plan.processes

    def __iter__(self) -> Iterator[list[int | None]]:
        return self.plan.batches(self.sampler)


class Dealt(IterableDataset):
    """One process's rows of a stream, which every process reads: batch after batch goes to one after the other.

    Args:
        rows: the stream.
        batch_size: rows of a batch.
        processes, index: how many share the stream, and which of them this is.
        drop_last: leave out what does not fill a batch of every process.
        plan: deals by rounds instead.
    """

    def __init__(
        self, rows: Any, batch_size: int, processes: int, index: int, drop_last: bool, plan: Plan | None = None
    ) -> None:
        self.rows, self.batch_size, self.processes, self.index = rows, batch_size, processes, index
        self.drop_last, self.plan = drop_last, plan

    def __iter__(self) -> Iterator[Any]:
        if self.plan is not None:
            with readable("data: a stream broke off"):
                for number, batch in enumerate(self.plan.batches(self.rows)):
                    if number % self.processes == self.index:
                        yield from batch
            return
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
    plan: Plan | None = None,
    deal: Deal = by_position,
) -> DataLoader:
    """The batches of this process, on its device.

    Args:
        rows: a table of rows, or a stream.
        collate: rows, among them fillers -> batch.
        args: batch sizes and how to load.
        accelerator: knows the processes.
        training: in the order of `train_sampling_strategy`, with `dataloader_drop_last`; else in that of the rows, all of them.
        plan: deal the rows by rounds.
        deal: shares the rows of each optimizer step out, where they are a table that is trained on without a plan.
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
        mine = Dealt(rows, size, accelerator.num_processes, accelerator.process_index, drop_last, plan)
        return prepare_data_loader(  # told of one process, it does not deal again
            DataLoader(mine, batch_size=size if plan is None else plan.every * size, **settings),
            device=accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
        )
    table = Filled(rows)
    shuffled = training and args.train_sampling_strategy == "random"
    sampler = RandomSampler(table) if shuffled else SequentialSampler(table)
    if plan is not None:
        batches = Rounds(sampler, plan)
    elif training:
        more = {"accumulation": args.gradient_accumulation_steps, "drop_last": drop_last, "deal": deal}
        batches = EvenBatches(sampler, size, accelerator.num_processes, **more)
    else:
        batches = EvenBatches(sampler, size, accelerator.num_processes)
    return accelerator.prepare_data_loader(DataLoader(table, batch_sampler=batches, **settings))
