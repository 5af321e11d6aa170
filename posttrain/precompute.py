"""`posttrain logps`: what does not change while training, computed once and kept on disk."""

from __future__ import annotations

import dataclasses

from . import console, references, teacher_fill
from .models import load_policy, load_tokenizer
from .recipe import Run
from .run import load_data, quiet_libraries, require_extras, settle, tokens_in_common
from .schema import UserError


def precompute(run: Run) -> int:
    """Compute and keep the reference's log-probs of every row of a run, or what its teacher says of them.

    Returns:
        How many completions are kept.

    Raises:
        UserError: as `run.prepare`, or an objective without reference.
    """
    if not run.objective.reads_reference(run.config):
        raise UserError(f"logps: {run.objective.name} reads no reference")
    if run.objective.online:
        raise UserError(f"logps: {run.objective.name} samples its completions; nothing of them is known before it trains")
    if run.reference.kind in ("ema", "soup"):
        raise UserError(f"logps: reference.kind = {run.reference.kind} is not kept on disk; possible: frozen, adapter, cached")
    quiet_libraries()
    run = _cached(run)
    require_extras(run)
    references.kind_of(run)
    teacher_fill.refuse(run)
    run, args = settle(run)
    tokenizer = load_tokenizer(run.model)
    loaded = load_data(run, args, tokenizer)
    references.refuse_other_tokenizer(run, tokenizer)
    common = tokens_in_common(run, tokenizer, loaded)
    model = load_policy(run.model, args.seed)
    if run.objective.reads_teacher:
        cache = teacher_fill.kept(run, args, model, loaded, tokenizer, common)
        cache.verify()
        told = {"teacher": cache.description, "left to other items": f"{cache.tail():.2%} of the probability, on average"}
    else:
        cache = references.cached(run, args, model, loaded)
        told = {"reference": cache.description}
    if args.process_index == 0:
        console.show({**told, "completions": str(len(cache))}, title="log-probs")
    return len(cache)


def _cached(run: Run) -> Run:
    """The run with its reference, or a teacher that is a model, kept on disk."""
    if not run.objective.reads_teacher:
        return dataclasses.replace(run, reference=dataclasses.replace(run.reference, kind="cached"))
    if run.teacher.kind in teacher_fill.KINDS:
        return run
    return dataclasses.replace(run, teacher=dataclasses.replace(run.teacher, kind="cached"))
