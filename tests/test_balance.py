"""Rows of a step dealt by length: which rows a step has stays, nobody waits longer than before, and the step is the same."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny
from torch.utils.data import SequentialSampler
from trajectory import PROBE, rows_for
from transformers import TrainingArguments

from posttrain.balance import ByLength, even, tokens_of
from posttrain.loading import EvenBatches, by_position, loader
from posttrain.mismatch import Mismatched
from posttrain.models import attach
from posttrain.reference import FrozenModel
from posttrain.trainer import Trainer

tokens = st.lists(st.integers(1, 2000), min_size=1, max_size=60)
few = st.integers(1, 5)


def deal_of(lengths: list[int], layout: str = "tree") -> ByLength:
    return ByLength(np.array(lengths), SimpleNamespace(layout=layout))


def most(lengths: list[int], batches: list[list[int]], processes: int) -> int:
    """Tokens of the process that has the most."""
    return max(sum(lengths[row] for batch in batches[index::processes] for row in batch) for index in range(processes))


def flat(batches: Iterable[list[int]]) -> list[int]:
    """All rows of the batches, sorted."""
    return sorted(row for batch in batches for row in batch)


@given(loads=st.lists(st.integers(0, 1000), max_size=40), parts=few)
def test_even_shares_differ_by_the_largest_load_at_most(loads: list[int], parts: int) -> None:
    shares = even(loads, parts)
    assert sorted(number for share in shares for number in share) == list(range(len(loads)))
    assert max(map(len, shares)) == -(-len(loads) // parts)
    totals = [sum(loads[number] for number in share) for share in shares]
    assert max(totals) - min(totals) <= max(loads, default=0) or len(loads) % parts  # else some have one load less


def test_the_largest_goes_to_the_smallest_total_with_room() -> None:
    assert even([5, 9, 1, 7, 3, 8], 3) == [[1, 2], [5, 4], [3, 0]]
    assert even([9, 1, 1, 1], 2) == [[0, 3], [1, 2]]
    assert even([4, 4], 3) == [[0], [1], []]


@given(lengths=tokens, size=few, processes=few, accumulation=few, layout=st.sampled_from(["tree", "separate"]))
def test_steps_have_the_rows_they_had(lengths: list[int], size: int, processes: int, accumulation: int, layout: str) -> None:
    sides = [
        EvenBatches(SequentialSampler(lengths), size, processes, accumulation=accumulation, deal=deal)
        for deal in (by_position, deal_of(lengths, layout))
    ]
    before, after = map(list, sides)
    assert len(before) == len(after) == len(sides[1]) and not len(after) % processes
    assert all(len(batch) == size for batch in after)
    for start in range(0, len(after), accumulation * processes):
        steps = [
            [[row for row in batch if row is not None] for batch in side[start : start + accumulation * processes]]
            for side in (before, after)
        ]
        assert flat(steps[0]) == flat(steps[1])
        assert sum(map(bool, steps[0])) == sum(map(bool, steps[1]))  # as many micro-batches without rows
        assert all(batch == sorted(batch) for batch in steps[1])


@given(lengths=tokens, size=few, processes=few, accumulation=few)
def test_what_fills_no_turn_is_dropped_before_it_is_dealt(
    lengths: list[int], size: int, processes: int, accumulation: int
) -> None:
    sampler, deal = SequentialSampler(lengths), deal_of(lengths)
    dealt = EvenBatches(sampler, size, processes, accumulation=accumulation, deal=deal, drop_last=True)
    kept = len(lengths) // (size * processes) * size * processes
    assert flat(dealt) == list(range(kept)) and len(dealt) == len(list(dealt)) == kept // size


@given(lengths=st.lists(st.integers(1, 2000), min_size=24, max_size=24), layout=st.sampled_from(["tree", "separate"]))
def test_what_shares_a_micro_batch_depends_on_its_size_alone(lengths: list[int], layout: str) -> None:
    """So a loss in which rows of a micro-batch affect each other is the same on any number of processes."""
    deal = deal_of(lengths, layout)
    alone, two, four = (sorted(deal(range(24), 3, processes)) for processes in (1, 2, 4))
    assert alone == two == four


def test_the_most_loaded_process_has_less() -> None:
    lengths = np.random.default_rng(0).lognormal(5, 0.8, (200, 32)).astype(int).tolist()
    share = {
        name: np.mean([most(row, deal(range(32), 4, 8), 8) * 8 / sum(row) for row, deal in zip(lengths, deals, strict=True)])
        for name, deals in {"position": [by_position] * 200, "length": [deal_of(row) for row in lengths]}.items()
    }
    assert share["position"] > 1.6 and share["length"] < 1.25


def test_rows_of_like_length_share_what_is_filled_up() -> None:
    lengths = [10, 500, 20, 400, 30, 300, 40, 200]
    assert sorted(deal_of(lengths, "separate")(range(8), 2, 2)) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert deal_of(lengths, "separate")(range(8), 2, 2)[:2] == [[1, 3], [5, 7]]  # a turn has like micro-batches


@pytest.mark.parametrize("chosen", [slice(None), [7, 3, 3, 0], []])
def test_tokens_of_columns_are_those_of_rows(chosen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.balance._AT_ONCE", 3)
    draw = np.random.default_rng(0)
    rows = [
        {"prompt": [1] * int(draw.integers(1, 9)), "one": [[2] * int(n) for n in draw.integers(1, 9, i % 3)], "label": i}
        for i in range(8)
    ]
    table = Dataset.from_list(rows)
    picked = list(range(8)) if chosen == slice(None) else chosen
    table = table if chosen == slice(None) else table.select(picked)
    expected = [len(rows[i]["prompt"]) + sum(map(len, rows[i]["one"])) for i in picked]
    assert tokens_of(table, ["one"]).tolist() == tokens_of([rows[i] for i in picked], ["one"]).tolist() == expected
    assert tokens_of(Mismatched(table, [], {}, 9), ["one"]).tolist() == expected
    assert tokens_of(table, []).tolist() == [len(rows[i]["prompt"]) for i in picked]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_goes_on_where_it_stopped(tmp_path, workers: int) -> None:
    args = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=2, gradient_accumulation_steps=3,
        dataloader_num_workers=workers, report_to=[],
    )  # fmt: skip
    lengths = np.random.default_rng(0).integers(1, 99, 17).tolist()

    def epochs(skip: int) -> list[list[list[int | None]]]:
        torch.manual_seed(3)
        rows = loader(list(range(17)), list, args, Accelerator(cpu=True), training=True, deal=deal_of(lengths))
        first = list(skip_first_batches(rows, skip))
        rows.set_epoch(1)
        return [first, list(rows)]

    (first, second), (rest, again) = epochs(0), epochs(3)
    assert rest == first[3:] and again == second and first != second
    assert sorted(row for batch in first for row in batch if row is not None) == list(range(17))


@pytest.mark.parametrize("layout", ["tree", "separate"])
def test_loss_and_gradient_of_a_step_are_the_same(tmp_path, layout: str) -> None:
    """Of a loss with means over tokens and over rows, in float64; the micro-batches are others."""
    args = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=3, gradient_accumulation_steps=4, seed=1,
        report_to=[], disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    models = [tiny("llama", dtype=torch.float64, seed=seed) for seed in (0, 1)]
    for model in models:
        attach(model)
    trainer = Trainer(
        objective=PROBE, config=PROBE.config(), model=models[0], args=args, reference=FrozenModel(models[1], "random"),
        layout=layout, starts_at_reference=False, impl="chunked", train_dataset=rows_for(PROBE, 12),
    )  # fmt: skip
    trainer.state.max_steps = 1
    by_length = trainer.get_train_dataloader()
    assert isinstance(by_length.batch_sampler.deal, ByLength)
    plain = loader(trainer.train_dataset, trainer.data_collator, args, trainer.accelerator, training=True)
    found = []
    for batches in (by_length, plain):
        batches, counts = trainer.get_batch_samples(iter(batches), 4, args.device)
        models[0].zero_grad()
        loss = sum(trainer.compute_loss(models[0], batch, num_items_in_batch=counts) for batch in batches)
        loss.backward()
        sizes = sorted(int((batch["tree"] > 0).sum()) for batch in batches)
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in models[0].parameters()]), sizes))
    (loss, gradient, sizes), (other, beside, others) = found
    assert loss == pytest.approx(other, rel=1e-13) and torch.allclose(gradient, beside, rtol=1e-10, atol=1e-14)
    assert sizes != others and (max(sizes) < max(others) or layout == "separate")


def test_one_micro_batch_keeps_its_order() -> None:
    assert deal_of([5, 9, 1, 7])([2, 0, 3, 1], 4, 1) == [[2, 0, 3, 1]]
