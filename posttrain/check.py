"""`posttrain check`: everything about a run that can be known without its weights."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerBase, TrainingArguments

from . import console, learned, memory, references, teacher_fill, teachers, trainers
from .checkpoints import checkpoint_to_resume
from .data import Loaded
from .models import add_adapter, bf16_available, load_config, parameter_counts
from .recipe import Run
from .run import compared, load_data, quiet_libraries, require_extras, settle, tokens_in_common
from .schema import UserError
from .scoring import scorer_config
from .trained import tokenizer_of
from .trees import shareable


def check(run: Run) -> None:
    """Resolve a run and print what it would do.

    Raises:
        UserError: what `posttrain train` would refuse before it reads weights.
    """
    quiet_libraries()
    require_extras(run)
    references.kind_of(run)
    teacher_fill.refuse(run)
    trainers.refuse(run)
    run, args = settle(run)
    tokenizer = tokenizer_of(run)
    loaded = load_data(run, args, tokenizer)
    model = outline(run)
    out = console.console()
    for title, section in run.resolved().items():
        if isinstance(section, dict):
            console.show({key: str(value) for key, value in section.items() if value not in (None, {}, [])}, title, out)
    console.show(_data(loaded), "data as read", out)
    console.show(_example(loaded), "first row as the model sees it", out)
    console.show(_plan(run, args, loaded, model) | _vocabulary(run, tokenizer, loaded), "plan", out)


def outline(run: Run) -> nn.Module:
    """The policy, with the objective's own parameters, without weights: on the meta device."""
    dtype = run.model.dtype
    if dtype == "auto":
        dtype = "bfloat16" if run.model.peft is not None and bf16_available() else "float32"
    with torch.device("meta"):
        kind, task, config = AutoModelForCausalLM, "CAUSAL_LM", load_config(run.model)
        if run.objective.scores:
            kind, task, config = AutoModelForSequenceClassification, "SEQ_CLS", scorer_config(run.model)
        model = kind.from_config(config, dtype=vars(torch)[dtype], trust_remote_code=run.model.trust_remote_code)
        model = model if run.model.peft is None else add_adapter(model, run.model.peft, 0, task)
        reference = run.model if run.reference.model is None else dataclasses.replace(run.model, name=run.reference.model)
        learned.add(model, run.objective, run.config, load_config(reference), seed=0)
        return model


def _data(loaded: Loaded) -> dict[str, str]:
    return {"rows": str(loaded.report)}


def _example(loaded: Loaded) -> dict[str, str]:
    return dict(loaded.report.train[0].example)


def _vocabulary(run: Run, tokenizer: PreTrainedTokenizerBase, loaded: Loaded) -> dict[str, str]:
    """What student and teachers have in common; nothing without a teacher."""
    if not run.objective.reads_teacher:
        return {}
    if teachers.other_tokenizer(run, tokenizer) is None:
        tokens_in_common(run, tokenizer, loaded)
    return {"vocabulary": teachers.vocabulary(run, tokenizer)}


def _plan(run: Run, args: TrainingArguments, loaded: Loaded, model: nn.Module) -> dict[str, str]:
    total, trainable = parameter_counts(model)
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    predicted = memory.predict(memory.shape(run, args, model, loaded.train, references.kind_of(run), teachers.sizes(run)))
    apart = shareable(model)
    shared = f"prompts apart, because {apart}" if apart else "prompts shared, where the step-0 check finds it exact"
    return {
        "model": f"{total:,} parameters, {trainable:,} trained",
        **compared(run),
        **trainers.describe(run),
        "layout": shared if run.layout == "auto" else run.layout,
        "steps": f"{_steps(run, args, loaded, rows)} of {rows} {'prompts' if run.objective.online else 'rows'}",
        "memory": f"{memory.gib(sum(predicted.values()))} on each device: "
        + ", ".join(f"{name} {memory.gib(size)}" for name, size in predicted.items() if size),
        "output": _output(run, args),
    }


def _steps(run: Run, args: TrainingArguments, loaded: Loaded, rows: int) -> int:
    if args.max_steps > 0:
        return args.max_steps
    again = (run.rollouts.epochs or 1) if run.objective.online else 1
    return int(-(-loaded.report.train_rows // rows) * again * args.num_train_epochs)


def _output(run: Run, args: TrainingArguments) -> str:
    try:
        checkpoint = checkpoint_to_resume(run)
    except UserError as error:
        return f"{args.output_dir}; training would be refused: {error}"
    return f"{args.output_dir}" + (f", continued from {checkpoint}" if checkpoint else "")
