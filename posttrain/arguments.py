"""The `train:` section of a run: the arguments of `transformers.TrainingArguments`, verbatim.

Names and types are theirs; the defaults that are ours, and the arguments that this trainer would not honour, are declared here.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from .schema import UserError, suggest

OUTPUT_DIR = "runs/<objective>-<model>-<data>"
"""Stands for the output folder until the run is known."""

WHERE_AVAILABLE = "where the device has it"
"""Stands for a value until the device is known."""

DEFAULTS: dict[str, tuple[Any, str]] = {
    "output_dir": (OUTPUT_DIR, "a folder per run"),
    "num_train_epochs": (1, "preferences are overfitted by a second pass before they are learned better"),
    "learning_rate": (1e-6, "the order of magnitude of published DPO runs; adapters want about ten times more"),
    "lr_scheduler_type": ("cosine", "as in the published recipes of DPO"),
    "warmup_steps": (0.1, "share of all steps; Adam's second moments are unreliable before"),
    "bf16": (WHERE_AVAILABLE, "half the memory of activations; parameters and the loss stay float32"),
    "logging_steps": (10, "500 would hide a short run"),
    "logging_first_step": (True, "the first loss is the one that can be checked: it is known"),
    "logging_nan_inf_filter": (False, "a loss that is not a number is shown, not averaged away"),
    "save_total_limit": (2, "a checkpoint holds the optimizer, three times the model"),
    "eval_strategy": ("epoch", "where held-out data is given; no otherwise"),
    "dataloader_pin_memory": (WHERE_AVAILABLE, "there is nothing to pin for without a GPU"),
    "accelerator_config": (
        {"dispatch_batches": False},
        "each process packs its own rows; packed batches cannot be cut and sent",
    ),
    "log_level_replica": ("error", "every process would repeat the warnings of the first"),
    "report_to": ("none", "nothing leaves the machine unasked"),
    "remove_unused_columns": (False, "rows are token ids; the collator uses all of them"),
}
"""Our defaults where they differ from TrainingArguments', each with its reason."""

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "label_smoothing_factor": ((0.0,), "it smooths a cross-entropy, which is not computed here; dpo has label_smoothing"),
    "remove_unused_columns": ((False,), "rows are token ids; every column is used"),
    "train_sampling_strategy": (("random", "sequential"), "the collator packs rows, lengths need no grouping"),
    "length_column_name": (("length",), "rows are not grouped by length"),
    "label_names": ((None,), "batches have no labels"),
    "average_tokens_across_devices": ((True,), "the mean is always over all devices"),
    "do_train": ((False,), "scripts read it, the trainer does not"),
    "do_eval": ((False,), "scripts read it, the trainer does not; give data.eval"),
    "do_predict": ((False,), "scripts read it, the trainer does not"),
    "prediction_loss_only": ((False,), "evaluation always gives the loss and the metrics of the objective"),
    "include_for_metrics": (([],), "the metrics are those of the objective"),
    "batch_eval_metrics": ((False,), "the metrics are those of the objective"),
    "eval_do_concat_batches": ((True,), "evaluation keeps no predictions"),
    "eval_use_gather_object": ((False,), "evaluation keeps no predictions"),
    "eval_accumulation_steps": ((None,), "evaluation keeps no predictions"),
    "use_cache": ((False,), "nothing is generated while training"),
    "auto_find_batch_size": ((False,), "how many rows a step has is not left to chance; posttrain check predicts the memory"),
}
"""Arguments that this trainer would ignore or that contradict it: the values that are true of it, and why no other."""

DEALT: dict[str, bool] = {"split_batches": False, "dispatch_batches": False, "even_batches": True}
"""What this trainer does in place of these keys of `accelerator_config`: each process packs its own rows, none is repeated."""

_WIDER: dict[str, Any] = {
    "resume_from_checkpoint": bool | str | None,
    "parallelism_config": dict[str, Any] | None,
}
"""Types where TrainingArguments' annotation is narrower than what it reads, or not writable in YAML."""


@functools.cache
def types() -> dict[str, Any]:
    """Each argument of TrainingArguments with its type."""
    from transformers import TrainingArguments

    return {**typing.get_type_hints(TrainingArguments), **_WIDER}


def parse_train(values: Mapping[str, Any], where: str = "train") -> dict[str, Any]:
    """Check and convert the `train:` section; nothing is added.

    Raises:
        UserError: an unknown name, a value of another type, or an argument this trainer would ignore.
    """
    known = types()
    parsed = {}
    for name, value in values.items():
        if name not in known:
            raise UserError(
                f"{where}: unknown argument {name!r}{suggest(str(name), list(known))} "
                "Possible: the arguments of transformers.TrainingArguments (posttrain show train)"
            )
        parsed[name] = _convert(name, known[name], value, where)
        if name in REFUSED and parsed[name] not in REFUSED[name][0]:
            allowed, reason = REFUSED[name]
            raise UserError(
                f"{where}: {name} = {value!r} would be ignored: {reason}; leave it out ({' or '.join(map(repr, allowed))})"
            )
    config = parsed.get("accelerator_config")
    for key, value in (config if isinstance(config, Mapping) else {}).items():
        if key in DEALT and value != DEALT[key]:
            raise UserError(
                f"{where}: accelerator_config.{key} = {value!r} would be ignored: each process packs its own rows, "
                "every row of an epoch once; leave it out"
            )
    return parsed


def _convert(name: str, kind: Any, value: Any, where: str) -> Any:
    if value is False and name.endswith("_strategy"):
        value = "no"  # what YAML reads as false
    try:
        return TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        messages = list(dict.fromkeys(one["msg"] for one in error.errors()))
        raise UserError(f"{where}: {name} = {value!r}: {', or '.join(messages)}") from None
