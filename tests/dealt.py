"""Epochs of rows of many lengths, dealt: `torchrun --nproc-per-node 2 dealt.py FOLDER` writes what each process gets."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from transformers import TrainingArguments

from posttrain.balance import ByLength
from posttrain.loading import loader

ROWS = 37
LENGTHS = np.random.default_rng(0).lognormal(4, 1, ROWS).astype(int)
"""Tokens of each row."""

DONE = 2
"""Steps after which an epoch is gone on with."""

Batches = list[list[int | None]]


def dealt(folder: Path, batch: int, accumulation: int) -> dict[str, Batches]:
    """This process's batches of two epochs, and of the first from its step `DONE` on."""
    args = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        report_to=[],
    )
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=1))
    deal = ByLength(LENGTHS, SimpleNamespace(layout="tree"))

    def epoch(number: int, skipped: int = 0) -> Batches:
        rows = loader(list(range(ROWS)), list, args, accelerator, training=True, deal=deal)
        rows = skip_first_batches(rows, skipped) if skipped else rows
        rows.set_epoch(number)
        return list(rows)

    return {"first": epoch(0), "second": epoch(1), "rest": epoch(0, DONE * accumulation)}


def main() -> None:
    """Write what this process gets."""
    folder = Path(sys.argv[1])
    got = dealt(folder, batch=2, accumulation=2)
    (folder / f"{Accelerator().process_index}.json").write_text(json.dumps(got))


if __name__ == "__main__":
    main()
