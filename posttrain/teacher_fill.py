"""A teacher that is asked once: which runs can do with what it says, and who answers what is not on disk yet."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from posttrain_kernels import ONE_HEAD
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments

from . import console, data, teachers
from .models import Request, dtypes
from .recipe import Run
from .reference import Teachers, fingerprint, sequence_key
from .references import cache_folder
from .schema import UserError
from .settings import RolloutsConfig
from .stats import Top, roles_of
from .teacher_cache import CachedTeacher, Entry
from .teacher_server import ServedTeacher
from .trees import Layout, TreeCollator, shareable
from .vocabulary import likeliest

KINDS = ("cached", "served")
"""The kinds of teacher that are asked before training."""


def top_of(run: Run) -> Top:
    """The likeliest items that the objective of a run reads.

    Raises:
        UserError: it reads the whole distribution, or at a temperature that a server does not give.
    """
    method, kind = run.objective, run.teacher.kind
    tops = [entry for entry in method.want(run.config) if isinstance(entry, Top)]
    others = [entry for entry in method.want(run.config) if entry not in tops and entry not in ONE_HEAD]
    if len(tops) != 1 or others:
        instead = "give top, the number of items (--top 64)" if "top" in vars(run.config) else "possible: model, adapter"
        raise UserError(
            f"teacher: kind = {kind} keeps a teacher's likeliest items, {method.name} reads its whole distribution; {instead}"
        )
    if kind == "served" and tops[0].temperature != 1:
        raise UserError(
            f"teacher: kind = served gives log-probs at temperature 1, {method.name} reads them at {tops[0].temperature:g}; "
            "use temperature 1, or kind = cached"
        )
    return tops[0]


def refuse(run: Run) -> None:
    """Refuse a run that a teacher asked once cannot serve; nothing is loaded.

    Raises:
        UserError: as `top_of`, or rows that can be read only once or are sampled while training.
    """
    if not run.objective.reads_teacher or run.teacher.kind not in KINDS:
        return
    top_of(run)
    if run.data.streaming:
        raise UserError(f"teacher: kind = {run.teacher.kind} needs rows that can be read twice; data.streaming cannot")
    if run.rollouts != RolloutsConfig():
        raise UserError(
            f"teacher: kind = {run.teacher.kind} is asked of the data before training, and rollouts come while training; "
            "possible: model, adapter"
        )


def kept(
    run: Run,
    args: TrainingArguments,
    model: nn.Module,
    loaded: data.Loaded,
    tokenizer: PreTrainedTokenizerBase,
    size: int,
) -> CachedTeacher:
    """What the teacher says of the rows of a run, completed; every process asks for its share.

    Args:
        size: tokens in common with the student; of a served teacher, rows of the student's head.

    Raises:
        UserError: the teacher cannot be loaded or reached, or is not the student's, or the cache is damaged.
    """
    top, roles = top_of(run), roles_of(run.objective.family)
    k = min(top.k, size)
    if run.teacher.kind == "served":
        server = _server(run, k, size)
        address = hashlib.blake2b(f"served {server.model} to {size}".encode(), digest_size=12).hexdigest()
        cache = _cache(run, address, k, size, server.model)
    else:
        taught = teachers.build(run, size)
        body = taught.models[0] if taught.models else model
        numbers = f"{dtypes(list(body.parameters()))} in {_compute(args)}, {size} tokens, temperature {top.temperature:g}"
        name = run.teacher.model[0].name if run.teacher.model else run.model.name
        cache = _cache(run, fingerprint(name, body, numbers), k, size, name if taught.models else taught.description)
    rows = [row for part in (loaded.train, loaded.eval) if part is not None for row in cache.missing(part, roles)]
    if not rows:
        return cache
    PartialState().wait_for_everyone()  # all have read the same cache before anyone writes
    share = rows[args.process_index :: args.world_size]
    if run.teacher.kind == "served":
        server.check(rows, roles, tokenizer)
        answers = server.answers(share, roles)
    else:
        answers = _computed(run, args, taught, model, cache, share, top)
    console.track(cache.keep(answers), len(share) * len(roles), "teacher")
    if run.teacher.kind == "served":
        server.close()
    PartialState().wait_for_everyone()
    cache.reload()
    return cache


def _server(run: Run, k: int, size: int) -> ServedTeacher:
    teacher = run.teacher
    more = {name: value for name in ("timeout", "retries") if (value := vars(teacher)[name]) is not None}
    return ServedTeacher(teacher.url, model=teacher.model[0].name if teacher.model else None, k=k, size=size, **more)


def _cache(run: Run, address: str, k: int, size: int, name: str) -> CachedTeacher:
    return CachedTeacher(cache_folder(run.teacher.cache) / "teacher" / f"{address}-top{k}", k=k, size=size, name=name)


def _compute(args: TrainingArguments) -> str:
    return "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"


def _computed(
    run: Run,
    args: TrainingArguments,
    taught: Teachers,
    model: nn.Module,
    cache: CachedTeacher,
    rows: list[dict[str, Any]],
    top: Top,
) -> Iterator[list[tuple[bytes, Entry]]]:
    """What a model here says of the completions of `rows`, shortest first; `model` is the student."""
    if PartialState().distributed_type in ("FSDP", "DEEPSPEED"):
        raise UserError(f"teacher: rows are missing in {cache.folder}; run `posttrain logps` before sharded training")
    body = taught.models[0] if taught.models else model
    body.to(args.device)
    layout = "separate" if run.layout == "separate" or shareable(body) else "tree"
    low = torch.bfloat16 if args.bf16 else torch.float16
    with torch.autocast(args.device.type, dtype=low, enabled=args.bf16 or args.fp16):
        yield from computed(
            taught, model, rows, roles_of(run.objective.family), top, layout, args.per_device_eval_batch_size, args.device
        )


def computed(
    taught: Teachers,
    model: nn.Module,
    rows: Sequence[dict[str, Any]],
    roles: Sequence[str],
    top: Top,
    layout: Layout,
    batch_size: int,
    device: torch.device | str,
) -> Iterator[list[tuple[bytes, Entry]]]:
    """What a teacher says of the completions of `rows`, shortest rows first, by their addresses in a cache; `model` is the
    student."""
    collate = TreeCollator(roles, layout=layout)
    rows = sorted(rows, key=lambda row: len(row["prompt"]) + sum(len(one) for role in roles for one in row[role]))
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        batch = {name: tensor.to(device) for name, tensor in collate(chosen).items()}
        request = Request(gather=batch["gather"], targets=batch["targets"], want=())
        (head,), _ = taught.heads(model, batch, layout, request)
        found = {name: values.cpu().numpy() for name, values in likeliest(head, batch["targets"], top).items()}
        asked = [(row["prompt"], completion) for role in roles for row in chosen for completion in row[role]]
        cuts = np.cumsum([len(completion) for _, completion in asked])[:-1]
        parts = zip(*(np.split(found[name], cuts) for name in ("ids", "logps", "own")), strict=True)
        yield [
            (sequence_key(*one), Entry(ids=ids, logps=logps, own=own))
            for one, (ids, logps, own) in zip(asked, parts, strict=True)
        ]
