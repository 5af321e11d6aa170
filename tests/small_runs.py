"""Small runs: the settings that tests of the trainers share, over a folder with `rows.jsonl`."""

from __future__ import annotations

from pathlib import Path

from posttrain.run import Prepared


def settings_of(folder: Path, output: Path, *more: str, model: str = "model") -> list[str]:
    """Three steps of four rows on the CPU, at one learning rate; of what is given twice the last counts.

    Args:
        folder: of model and rows.
        output: of the run.
        more: further settings.
        model: the model's name in the folder.
    """
    shared = {
        "model": folder / model,
        "data": folder / "rows.jsonl",
        "data.max_length": 200,
        "sampling.max_new_tokens": 6,
        "train.output_dir": output,
        "train.max_steps": 3,
        "train.learning_rate": 1e-2,
        "train.lr_scheduler_type": "constant",
        "train.warmup_steps": 0,
        "train.per_device_train_batch_size": 4,
        "train.logging_steps": 1,
        "train.use_cpu": "true",
    }
    return [*(f"{key}={value}" for key, value in shared.items()), *more]


def train(prepared: Prepared, resume: str | None = None) -> Prepared:
    """Train to the end, or to its error, and let the output folder go."""
    try:
        prepared.trainer.train(resume_from_checkpoint=resume)
    finally:
        prepared.lock.release()
    return prepared
