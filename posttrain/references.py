"""Which reference a run reads, and how it is built: a frozen model, the policy with its adapter off, or cached log-probs."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments

from . import console, data
from .mismatch import early_roles
from .models import attach, dtypes, load_model, load_tokenizer
from .moving import MovingModel
from .recipe import Run
from .reference import AdapterOff, CachedLogps, FrozenModel, fingerprint, reads_vocabulary
from .schema import UserError
from .stats import roles_of
from .trees import shareable


def kind_of(run: Run) -> str:
    """`frozen`, `adapter`, `cached`, or `none` for an objective that reads no reference.

    Raises:
        UserError: `cached`, for an objective that reads the reference over the whole vocabulary.
    """
    if run.objective.reads_teacher or not run.objective.reads_reference(run.config):
        return "none"
    if run.reference.kind == "cached" and reads_vocabulary(run.objective, run.config):
        raise UserError(
            f"reference.kind = 'cached': {run.objective.name} reads the reference over the whole vocabulary, not just its "
            "log-probs; possible: frozen, adapter, auto"
        )
    if run.reference.kind != "auto":
        return run.reference.kind
    return "adapter" if run.model.peft is not None and run.reference.model is None else "frozen"


def starts_there(run: Run) -> bool:
    """Whether the policy is its reference, or its teacher, before it trains."""
    another = run.reference.model is not None or run.reference.kind == "soup"
    return not another and not run.teacher.model and run.teacher.kind != "served"


def describe(run: Run) -> str:
    """Which reference a run reads, in words."""
    model = run.reference.model or run.model.name
    words = {
        "frozen": f"frozen model {model}",
        "adapter": "the policy with its adapter off",
        "cached": f"cached log-probs of {model}",
        "ema": f"moving average of the policy, from {model} on",
        "soup": f"mean of the weights of {', '.join(one.name for one in run.reference.models)}",
    }
    return words.get(kind_of(run), "none")


def refuse_other_tokenizer(run: Run, tokenizer: PreTrainedTokenizerBase) -> None:
    """A reference of its own has to read token ids as the policy does.

    Raises:
        UserError: its vocabulary is another; says by how much.
    """
    for other in ([run.reference.model] if run.reference.model else []) + [one.name for one in run.reference.models]:
        _refuse_tokenizer(run, tokenizer, other)


def _refuse_tokenizer(run: Run, tokenizer: PreTrainedTokenizerBase, other: str) -> None:
    settings = dataclasses.replace(run.model, name=other, tokenizer=None, revision=None, chat_template=None)
    theirs, ours = load_tokenizer(settings).get_vocab(), tokenizer.get_vocab()
    differing = sorted(token for token in {*theirs, *ours} if theirs.get(token) != ours.get(token))
    if differing:
        raise UserError(
            f"reference: {other} has another tokenizer than {run.model.name}: {len(theirs)} and {len(ours)} tokens, "
            f"{len(differing)} differ, {differing[0]!r} for one; a reference has to read the same tokens"
        )


def build(
    run: Run, args: TrainingArguments, model: nn.Module, loaded: data.Loaded
) -> FrozenModel | AdapterOff | CachedLogps | None:
    """The reference that a run reads; None where the objective reads none.

    Raises:
        UserError: it cannot be loaded, or its log-probs cannot be cached here.
    """
    kind = kind_of(run)
    if kind == "cached":
        return cached(run, args, model, loaded)
    if kind == "ema":
        settings = run.reference
        start = _reference_model(run), settings.model or run.model.name
        return MovingModel(*start, settings.rate or 0.01, settings.period or 1)
    if kind == "soup":
        return FrozenModel(_soup(run), describe(run))
    if kind == "frozen":
        return FrozenModel(_reference_model(run), run.reference.model or run.model.name)
    return AdapterOff() if kind == "adapter" else None


def cached(run: Run, args: TrainingArguments, model: nn.Module, loaded: data.Loaded) -> CachedLogps:
    """The cache of the reference's log-probs, completed for the rows of this run; every process computes its share.

    Raises:
        UserError: rows that can be read only once, or a model that is about to be sharded.
    """
    if run.data.streaming:
        raise UserError("reference: kind = cached needs rows that can be read twice; data.streaming cannot")
    model = model if run.reference.model is None else _reference_model(run)
    name = run.reference.model or run.model.name
    compute = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    numbers = fingerprint(name, model, f"{dtypes(list(model.parameters()))} in {compute}")
    cache = CachedLogps(cache_folder(run.reference.cache), numbers, name)
    roles = [*roles_of(run.objective.family), *early_roles(run.objective)]
    rows = [row for part in (loaded.train, loaded.eval) if part is not None for row in cache.missing(part, roles)]
    if rows:
        PartialState().wait_for_everyone()  # all have read the same cache before anyone writes
        _compute(run, args, model, cache, rows[args.process_index :: args.world_size], roles)
        PartialState().wait_for_everyone()
        cache.reload()
    return cache


def _reference_model(run: Run) -> nn.Module:
    """The reference as a model of its own, in the dtype of the policy, so that both start with the same numbers."""
    other = {"name": run.reference.model, "revision": None} if run.reference.model else {}
    model = load_model(dataclasses.replace(run.model, peft=None, **other), low_precision=run.model.peft is not None)
    attach(model)
    return model


def _soup(run: Run) -> nn.Module:
    """A model whose weights are the mean of several checkpoints'.

    Raises:
        UserError: one cannot be loaded, or is another architecture.
    """
    chosen = run.reference.models
    total = sum(one.weight for one in chosen)
    mean, parts = None, {}
    for one in chosen:
        settings = dataclasses.replace(run.model, name=one.name, revision=one.revision, peft=None)
        model = load_model(settings, low_precision=run.model.peft is not None, where="reference.models")
        weights = dict(model.named_parameters())
        mean, parts = (model, dict.fromkeys(weights, 0.0)) if mean is None else (mean, parts)
        expected = {name: weight.shape for name, weight in mean.named_parameters()}
        if {name: weight.shape for name, weight in weights.items()} != expected:
            raise UserError(f"reference.models: {one.name} has other weights than {chosen[0].name}; one architecture is needed")
        parts = {name: parts[name] + weight.detach().double() * (one.weight / total) for name, weight in weights.items()}
    with torch.no_grad():
        for name, weight in mean.named_parameters():
            weight.copy_(parts[name])
    attach(mean)
    return mean


def _compute(
    run: Run,
    args: TrainingArguments,
    model: nn.Module,
    cache: CachedLogps,
    rows: list[dict[str, Any]],
    roles: Sequence[str],
) -> None:
    if PartialState().distributed_type in ("FSDP", "DEEPSPEED"):
        raise UserError(
            f"reference: rows are missing in the cache {cache.folder}; run `posttrain logps` before sharded training"
        )
    low = torch.bfloat16 if args.bf16 else torch.float16
    adapted = run.reference.model is None and run.model.peft is not None
    layout = "separate" if run.layout == "separate" or shareable(model) else "tree"
    model.to(args.device)
    with (
        model.disable_adapter() if adapted else contextlib.nullcontext(),
        torch.autocast(args.device.type, dtype=low, enabled=args.bf16 or args.fp16),
    ):
        done = cache.fill(model, rows, roles, layout, args.per_device_eval_batch_size)
        console.track(done, len(rows), "reference log-probs")


def cache_folder(asked: str | None) -> Path:
    """Where log-probs are kept: as asked for in a section's `cache`, else as the environment says."""
    return Path(asked or os.environ.get("POSTTRAIN_CACHE") or "~/.cache/posttrain").expanduser()
