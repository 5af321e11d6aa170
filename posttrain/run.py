"""A run, from its settings to a trained model in a folder: `prepare` builds it, `execute` trains and saves it."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate import PartialState
from filelock import FileLock
from huggingface_hub import HfApi
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments

from . import card, console, data, learned, memory, references, teacher_fill, teachers, trainers
from .arguments import WHERE_AVAILABLE
from .checkpoints import Checkpoints, Stopped, checkpoint_to_resume, occupy, refuse_other_processes
from .faults import writing
from .foreign import Retold
from .mismatch import early_roles, with_mismatches
from .models import bf16_available, dtypes, load_config, parameter_counts
from .recipe import Run, load_run
from .records import Records
from .schema import UserError
from .stats import columns_of, roles_of
from .trained import base_of, model_of, tokenizer_of
from .trainer import Trainer

__all__ = ["Prepared", "Run", "Stopped", "execute", "load_run", "prepare"]

_EXTRAS = {
    "wandb": "trackers",
    "tensorboard": "trackers",
    "trackio": "trackers",
    "deepspeed": "deepspeed",
    "flash_attn": "flash-attn",
}
"""Optional package -> the extra of posttrain that brings it."""


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to train."""

    run: Run
    """Its settings."""

    args: TrainingArguments
    """The `train:` section, complete."""

    tokenizer: PreTrainedTokenizerBase
    """With the chat template in use."""

    data: data.Loaded
    """Tokenised rows and what was done to them."""

    model: nn.Module
    """The policy."""

    trainer: Trainer
    """Holds everything; `trainer.train()` trains."""

    checkpoint: str | None
    """The checkpoint to continue from."""

    checkpoints: Checkpoints
    """Completes checkpoints; knows whether the run was told to stop."""

    lock: FileLock | None
    """What keeps other runs out of the output folder; the first process has it."""


def prepare(run: Run) -> Prepared:
    """Build a run: everything that can be wrong is looked at before weights are read.

    Raises:
        UserError: a setting, a path, the data, a missing extra, or an output folder that is another run's.
    """
    require_extras(run)
    references.kind_of(run)
    teacher_fill.refuse(run)
    trainers.refuse(run)
    run, args = settle(run)
    lock = occupy(Path(args.output_dir)) if args.process_index == 0 else None
    checkpoint = checkpoint_to_resume(run)
    if checkpoint is not None:
        refuse_other_processes(Path(checkpoint), args)
    tokenizer = tokenizer_of(run)
    loaded = load_data(run, args, tokenizer)
    references.refuse_other_tokenizer(run, tokenizer)
    other = teachers.other_tokenizer(run, tokenizer)
    common = tokens_in_common(run, tokenizer, loaded) if other is None else None
    model = model_of(run, tokenizer, args.seed)
    if run.objective.reads_teacher and run.teacher.kind in teacher_fill.KINDS:
        reference = teacher_fill.kept(run, args, model, loaded, tokenizer, common)
    else:
        reference = references.build(run, args, model, loaded) or teachers.build(run, common)
    trainer = trainers.build(
        run,
        tokenizer,
        objective=teachers.weighted(run.objective, teachers.weights(run)) if run.objective.reads_teacher else run.objective,
        config=run.config,
        model=model,
        args=args,
        reference=reference,
        layout=run.layout,
        starts_at_reference=references.starts_there(run),
        retell=None if other is None else partial(Retold, tokenizer, other, teachers.positions(run)),
        nonfinite=run.nonfinite,
        train_dataset=loaded.train,
        eval_dataset=loaded.eval,
        processing_class=tokenizer,
        callbacks=[Records(run), console.ProgressLines()],
    )
    for theirs in (transformers.PrinterCallback, transformers.ProgressCallback):
        trainer.remove_callback(theirs)
    checkpoints = Checkpoints(run.train["save_total_limit"], trainer.accelerator)
    trainer.add_callback(checkpoints)
    return Prepared(run, args, tokenizer, loaded, model, trainer, checkpoint, checkpoints, lock)


def execute(run: Run) -> Prepared:
    """Train, evaluate and save a run, and say so.

    Raises:
        UserError: as `prepare`, or a self-check that fails.
        Stopped: it was told to stop, and left a checkpoint.
    """
    quiet_libraries()
    prepared = prepare(run)
    run = prepared.run
    trainer, args = prepared.trainer, prepared.args
    if args.process_index == 0:
        console.listen()
        console.show(header(prepared), title=f"posttrain {run.objective.name}")
        if prepared.checkpoint:
            console.console().print(f"continued from {prepared.checkpoint}")
    with writing(Path(args.output_dir)):
        result = trainer.train(resume_from_checkpoint=prepared.checkpoint)
        if prepared.checkpoints.stopped:
            raise Stopped(f"stopped at step {trainer.state.global_step}; the same command continues from the checkpoint there")
        metrics = {**result.metrics, **_final_evaluation(prepared)}
        trainer.release()
        export(prepared)
        if args.process_index == 0:
            card.write(run, prepared.data.report, args, metrics, compared=compared(run) | trainers.describe(run))
    if args.process_index == 0:
        _upload(prepared)
        console.show(_closing(prepared), title="saved")
        prepared.lock.release()
    return prepared


def _final_evaluation(prepared: Prepared) -> dict[str, float]:
    """Metrics on the held-out rows after the last step; taken over where it was evaluated already."""
    trainer = prepared.trainer
    if prepared.data.eval is None:
        return {}
    done = [logs for logs in trainer.state.log_history if logs["step"] == trainer.state.global_step and "eval_loss" in logs]
    return done[-1] if done else trainer.evaluate()


def load_data(run: Run, args: TrainingArguments, tokenizer: PreTrainedTokenizerBase) -> data.Loaded:
    """The rows of a run; the first process tokenises, the others read what it cached.

    Raises:
        UserError: the data is wrong, or does not fit `train:`.
    """
    online, columns = run.objective.online, columns_of(run.objective.family)
    with args.main_process_first(desc="tokenise"):
        roles = () if online else roles_of(run.objective.family)
        loaded = data.load(run.data, tokenizer, roles, columns, ended=not run.objective.scores, source=online)
    if run.data.streaming and args.max_steps <= 0:
        raise UserError("train: max_steps is required with data.streaming, whose end nobody knows")
    positions = load_config(run.model).get_text_config().to_dict().get("max_position_embeddings")
    _refuse_beyond_positions(run, loaded, positions)
    if run.objective.advise is not None and not run.data.streaming:
        loaded.report.advice.extend(run.objective.advise(run.config, {name: loaded.train[name][:] for name in columns}))
    return _with_early_roles(run, loaded, min(run.data.max_length, positions or run.data.max_length))


def _with_early_roles(run: Run, loaded: data.Loaded, longest: int) -> data.Loaded:
    """The rows with the completions that the objective reads before a step, which other rows lend them."""
    roles = early_roles(run.objective)
    if not roles:
        return loaded

    def paired(rows: Any, where: str) -> Any:
        if rows is None:
            return None
        return with_mismatches(rows, roles, seed=run.data.seed, max_length=longest, where=where)

    return dataclasses.replace(loaded, train=paired(loaded.train, "data"), eval=paired(loaded.eval, "data.eval"))


def _refuse_beyond_positions(run: Run, loaded: data.Loaded, positions: int | None) -> None:
    """A row longer than the model's positions is an index error for some models and noise for the others."""
    tallies = [*loaded.report.train, *([loaded.report.eval] if loaded.report.eval else [])]
    longest = max(min(tally.max_length, tally.lengths["tokens"][-1]) for tally in tallies)
    new = run.sampling.max_new_tokens if run.objective.online else 0
    if positions and new and longest + new > positions:
        raise UserError(
            f"data: prompts of up to {longest} tokens and sampling.max_new_tokens = {new} are more than the {positions} "
            f"positions of {run.model.name}; --data.max_length {max(positions - new, 2)} or fewer new tokens fit"
        )
    if positions and longest > positions:
        raise UserError(
            f"data: max_length = {run.data.max_length} lets {longest} tokens through and {run.model.name} has {positions} "
            f"positions; --data.max_length {positions} fits"
        )


def tokens_in_common(run: Run, tokenizer: PreTrainedTokenizerBase, loaded: data.Loaded) -> int:
    """Number of tokens that the student of a distillation shares with its teachers; 0 without a teacher.

    Raises:
        UserError: they have other tokens, or the data has tokens that a teacher does not know.
    """
    if not run.objective.reads_teacher:
        return 0
    size = teachers.common_tokens(run, tokenizer)
    if size < len(tokenizer):
        for rows in (loaded.train, loaded.eval):
            teachers.refuse_unread(run, size, () if rows is None else list(rows.take(64)) if run.data.streaming else rows)
    return size


def compared(run: Run) -> dict[str, str]:
    """Whom the policy of a run is compared with, in words."""
    if run.objective.reads_teacher:
        return {"teacher": teachers.describe(run)}
    return {"reference": references.describe(run)}


def settle(run: Run) -> tuple[Run, TrainingArguments]:
    """The run with what only the device decides filled in, and its `train:` section as the trainer takes it.

    Raises:
        UserError: values that transformers refuses.
    """
    train = dict(run.train)
    if train["bf16"] == WHERE_AVAILABLE:
        asked = os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
        train["bf16"] = (asked or bf16_available()) and not train.get("fp16") and (asked or not train.get("use_cpu"))
    if train["dataloader_pin_memory"] == WHERE_AVAILABLE:
        train["dataloader_pin_memory"] = torch.cuda.is_available() and not train.get("use_cpu")
    if train.get("hub_token"):
        os.environ["HF_TOKEN"] = train["hub_token"]  # rather than in the arguments: transformers writes these beside the model
    ours = {"save_total_limit": None, "hub_token": None}  # checkpoints.py removes old checkpoints
    try:
        args = TrainingArguments(**{**train, **_joined_on_cpu(train), **ours})
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
        raise UserError(f"train: {' '.join(str(error).split())}") from None
    return dataclasses.replace(run, train=train), args


def _joined_on_cpu(train: Mapping[str, Any]) -> dict[str, Any]:
    """What lets several processes without accelerators find each other; transformers would take each for a run of its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or torch.accelerator.is_available():
        return {}
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return {"use_cpu": True}  # this would turn DeepSpeed off
    PartialState(backend="gloo")
    return {"accelerator_config": {**train["accelerator_config"], "use_configured_state": True}}


def require_extras(run: Run) -> None:
    """Every optional package that the run names is installed.

    Raises:
        UserError: the first that is not, with the command that installs it.
    """
    reports = run.train.get("report_to") or []
    wanted = {name: "train.report_to" for name in ([reports] if isinstance(reports, str) else reports)}
    wanted = {name: where for name, where in wanted.items() if name not in ("none", "all")}
    if run.model.attention == "flash_attention_2":
        wanted["flash_attn"] = "model.attention"
    if run.train.get("deepspeed") or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        wanted["deepspeed"] = "train.deepspeed"
    if run.train.get("use_liger_kernel"):
        wanted["liger_kernel"] = "train.use_liger_kernel"
    for package, where in wanted.items():
        if importlib.util.find_spec(package) is None:
            extra = f"pip install 'posttrain[{_EXTRAS[package]}]'" if package in _EXTRAS else f"pip install {package}"
            raise UserError(f"{where}: {package} is not installed; {extra.replace('_', '-')}")


def export(prepared: Prepared) -> None:
    """The final model, whole and ready for `from_pretrained`, with its tokenizer; merged with its adapter where asked."""
    trainer, run = prepared.trainer, prepared.run
    output = Path(prepared.args.output_dir)
    if not run.model.merge:
        trainer.save_model()
        return
    trainer.save_model(str(output / "adapter"))
    if trainer.is_world_process_zero():
        from peft import PeftModel

        base = base_of(run, prepared.tokenizer)
        PeftModel.from_pretrained(base, output / "adapter").merge_and_unload().save_pretrained(output)
        prepared.tokenizer.save_pretrained(output)
    PartialState().wait_for_everyone()


def _upload(prepared: Prepared) -> None:
    """Bring the finished folder, with our card in place of the one that transformers drafts, to the hub."""
    args = prepared.args
    if args.push_to_hub:
        HfApi(token=prepared.run.train.get("hub_token")).upload_folder(
            repo_id=prepared.trainer.hub_model_id,
            folder_path=args.output_dir,
            commit_message="End of training",
            ignore_patterns=["_*", "checkpoint-*"],
            revision=args.hub_revision,
        )


def header(prepared: Prepared) -> dict[str, str]:
    """What a run says of itself before it trains."""
    run, args, trainer = prepared.run, prepared.args, prepared.trainer
    total, trainable = parameter_counts(prepared.model)
    parameters = list(prepared.model.parameters())
    compute = "bfloat16" if args.bf16 else "float16" if args.fp16 else dtypes(parameters)
    processes = args.world_size
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    predicted = memory.predict(
        memory.shape(run, args, prepared.model, prepared.data.train, references.kind_of(run), teachers.held(trainer.reference))
    )
    settings = ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(run.config).items())
    own = {} if trainer.own is None else {"own": learned.describe(trainer.own, args.learning_rate)}
    return {
        "objective": f"{run.objective.name}: {settings}",
        "model": f"{run.model.name}: {total:,} parameters, {trainable:,} trained ({trainable / total:.1%})",
        **own,
        "dtypes": f"parameters {dtypes(parameters)}, trained (master weights) "
        f"{dtypes([p for p in parameters if p.requires_grad])}, computed in {compute}, logits float32",
        next(iter(compared(run))): "none" if trainer.reference is None else trainer.reference.description,
        **trainers.describe(run),
        "data": str(prepared.data.report),
        "batch": f"{args.per_device_train_batch_size} rows x {args.gradient_accumulation_steps} accumulated x {processes} "
        f"processes = {rows} rows a step",
        "memory": f"{memory.gib(sum(predicted.values()))} predicted on each device (posttrain check itemises)",
        "output": args.output_dir,
        **({"remote code": f"that of {', '.join(trusted)} is run"} if (trusted := _trusted(run)) else {}),
    }


def _trusted(run: Run) -> list[str]:
    """The models whose own code is run (trust_remote_code)."""
    teachers_too = [one.name for one in run.teacher.model] if run.teacher.trust_remote_code else []
    return [*([run.model.name] if run.model.trust_remote_code else []), *teachers_too]


def _closing(prepared: Prepared) -> dict[str, str]:
    folder = prepared.args.output_dir
    kind = "adapter" if prepared.run.model.peft is not None and not prepared.run.model.merge else "model"
    return {
        kind: folder,
        "run": f"{folder}/run.json",
        "metrics": f"{folder}/metrics.jsonl",
        "use": card.usage(prepared.run, folder),
    }


def quiet_libraries() -> None:
    """Leave the screen to this program: only the first process warns, and without a terminal nothing draws bars."""
    if os.environ.get("RANK", "0") != "0":
        transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not console.console().is_terminal:
        datasets.disable_progress_bars()
