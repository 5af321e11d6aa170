"""The model card of a run (README.md in its folder): only what is known, from the settings, the data and the metrics."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from . import __version__
from .recipe import Run
from .replacing import replacing
from .tally import Report

_VERSIONS = ("torch", "transformers", "accelerate", "peft", "datasets")


def usage(run: Run, folder: str) -> str:
    """One line of Python that loads the result."""
    package, kind, more = _loader(run)
    return f'{package}.{kind}.from_pretrained("{folder}"{more})'


def _loader(run: Run) -> tuple[str, str, str]:
    """What loads the result: a package, a class of it, and further arguments."""
    task = "SequenceClassification" if run.objective.scores else "CausalLM"
    if run.model.peft is not None and not run.model.merge:
        return "peft", f"AutoPeftModelFor{task}", ", num_labels=1" if run.objective.scores else ""
    return "transformers", f"AutoModelFor{task}", ""


def write(
    run: Run, report: Report, args: TrainingArguments, metrics: Mapping[str, Any], *, compared: Mapping[str, str]
) -> None:
    """Write README.md into the output folder.

    Args:
        run: the settings.
        report: what was done to the data.
        args: the `train:` section, complete.
        metrics: what training and evaluation returned.
        compared: which reference or teacher was read, in words.
    """
    with replacing(Path(args.output_dir, "README.md")) as partial:
        partial.write_text(text(run, report, args, metrics, compared=compared), encoding="utf-8")


def text(run: Run, report: Report, args: TrainingArguments, metrics: Mapping[str, Any], *, compared: Mapping[str, str]) -> str:
    """The card."""
    name = (args.hub_model_id or Path(args.output_dir).name).split("/")[-1]
    base = run.model.name if not _is_local(run.model.name) else f"{Path(run.model.name).name} (a local folder)"
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    what = "an adapter for" if run.model.peft is not None and not run.model.merge else "a fine-tuned version of"
    parts = [
        f"---\n{yaml.safe_dump(_metadata(run), sort_keys=False)}---",
        f"# {name}",
        f"This model is {what} {base}, trained with `{run.objective.name}` by posttrain {__version__}.",
        "## Objective",
        f"```\n{run.objective.document}\n```",
        "## Settings",
        _table({f"objective.{key}": value for key, value in dataclasses.asdict(run.config).items()}),
        _table(_training(args) | {"rows a step": rows, "layout": run.layout, **compared}),
        "The complete settings are in `run.json`, the metrics of every log in `metrics.jsonl`.",
        "## Data",
        f"```\n{report}\n```",
        "## Results",
        _table(
            {key: f"{value:.6g}" for key, value in metrics.items() if key.startswith(("train_loss", "train_runtime", "eval_"))}
        ),
        "## Use",
        f"```python\n{_example(run, args.hub_model_id or args.output_dir)}\n```",
        "## Versions",
        _table({package: version(package) for package in _VERSIONS}),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(run: Run) -> dict[str, Any]:
    """What the hub reads; only hub ids can be named there."""
    adapter = run.model.peft is not None and not run.model.merge
    task = "text-classification" if run.objective.scores else "text-generation"
    found: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": task}
    if not _is_local(run.model.name):
        found["base_model"] = run.model.name
    sets = [name for name in (run.data.name, *(source.name for source in run.data.mixture)) if name and not _is_local(name)]
    if sets:
        found["datasets"] = sets
    return found | {"tags": ["posttrain", run.objective.name]}


def _is_local(name: str) -> bool:
    """Whether a name is a path rather than a hub id."""
    return Path(name).expanduser().exists() or name.startswith((".", "/", "~")) or name.count("/") > 1


def _training(args: TrainingArguments) -> dict[str, Any]:
    names = ("learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps", "optim", "weight_decay")
    names += ("max_grad_norm", "bf16", "seed")
    values = {name: vars(args)[name] for name in names}
    if values["max_steps"] <= 0:
        del values["max_steps"]
    else:
        del values["num_train_epochs"]
    return {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}


def _table(values: Mapping[str, Any]) -> str:
    """A table of two columns; what is not set is left out."""
    rows = [f"| {key} | {_cell(value)} |" for key, value in values.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *rows]) if rows else ""


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _example(run: Run, where: str) -> str:
    package, kind, more = _loader(run)
    lines = [f"from {package} import {kind}", "from transformers import AutoTokenizer"]
    if package == "transformers":
        lines = [f"from transformers import {kind}, AutoTokenizer"]
    lines += ["", f'tokenizer = AutoTokenizer.from_pretrained("{where}")', f'model = {kind}.from_pretrained("{where}"{more})']
    return "\n".join(lines)
