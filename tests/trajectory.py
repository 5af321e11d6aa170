"""A short training of a tiny random model, for any objective: what the invariants compare.

As a program it trains every objective named on its command line in the processes that torchrun started, and writes the
trajectories: `torchrun --nproc-per-node 2 trajectory.py FOLDER NAME...`. Under `accelerate launch` with DeepSpeed it trains
with that. A name may end in what it varies: `tdpo/adapter`, `tdpo/tied`.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from tiny_models import VOCABULARY, tiny
from transformers import TrainingArguments

from posttrain.experience import token_columns_of
from posttrain.leave import leave
from posttrain.mismatch import Mismatched, early_roles, lenders
from posttrain.models import attach
from posttrain.reference import AdapterOff, CachedLogps, FrozenModel, Teachers
from posttrain.registry import Objective, find
from posttrain.scoring import attach_scores
from posttrain.stats import Loss, Pairs, columns_of, roles_of
from posttrain.trainer import Trainer

STEPS = 4
ROWS_A_STEP = 4
EVALUATED = 7


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Settings of the probe: none."""


def _probe(config: ProbeConfig, pairs: Pairs) -> Loss:
    """A mean over tokens, another over other tokens, and one over rows: what no mean of means gets right."""
    rows = Loss(pairs.chosen.logratio.square())
    rejected = Loss(pairs.rejected.logps.exp(), per="rejected", plus=rows)
    return Loss(
        -pairs.chosen.logps, {"seen/sum": pairs.chosen.lengths, "seen/max": pairs.chosen.logps.detach()}, "chosen", rejected
    )


PROBE = Objective(
    name="probe",
    function=_probe,
    config=ProbeConfig,
    family=Pairs,
    reads_reference=lambda _config: True,
    want=lambda _config: (),
    start=lambda _config: None,
    before=None,
    before_reads=(),
    state=None,
    advise=None,
    learned=None,
    watch=None,
    any_tokenizer=False,
    coupled=False,
    lesson=None,
    document="",
)
"""Not registered: it tests the reduction, which the objectives of today may not exhaust."""


@dataclass(frozen=True)
class Trajectory:
    """What a training left behind."""

    losses: list[float]
    """Mean loss of each optimizer step."""

    metrics: list[dict[str, float]]
    """What the objective logged at each step."""

    evaluated: dict[str, float]
    """Loss and metrics of `EVALUATED` other rows at the end."""

    parameters: torch.Tensor
    """All parameters at the end, in one vector."""


def objective_named(name: str) -> Objective:
    """The objective of the package, or the probe."""
    return PROBE if name == PROBE.name else find(name)


def rows_for(objective: Objective, count: int = STEPS * ROWS_A_STEP) -> Sequence[dict[str, Any]] | Mismatched:
    """Rows of one epoch: prompts of 2 to 9 tokens, one completion of 1 to 7 tokens a role, columns of zeros and ones."""
    generator = np.random.default_rng(0)

    def ids(low: int, high: int) -> list[int]:
        return generator.integers(3, VOCABULARY, generator.integers(low, high)).tolist()

    rows = [
        {"prompt": ids(2, 10)}
        | {role: [ids(1, 8)] for role in roles_of(objective.family)}
        | {column: int(generator.integers(2)) for column in columns_of(objective.family)}
        for _ in range(count)
    ]
    for row in rows if token_columns_of(objective.family) else ():
        sizes = [len(completion) for completion in row["completion"]]
        row |= {
            f"token.{name}": [generator.normal(size=n).astype(np.float32) for n in sizes]
            for name in token_columns_of(objective.family)
        }
    early = early_roles(objective)
    return Mismatched(rows, lenders([row["prompt"] for row in rows], 0, "rows"), early, 64) if early else rows


@functools.cache
def _model(seed: int, dtype: torch.dtype, tied: bool, scores: bool) -> torch.nn.Module:
    return tiny("llama", dtype=dtype, seed=seed, scores=scores, tie_word_embeddings=tied)


def _policy(objective: Objective, peft: bool | list[str], dtype: torch.dtype, tied: bool) -> torch.nn.Module:
    """The policy; an adapter starts as its base, unless that is its teacher, of whom it would learn nothing."""
    model = copy.deepcopy(_model(0, dtype, tied, objective.scores))
    if peft:
        torch.manual_seed(0)
        task = "SEQ_CLS" if objective.scores else "CAUSAL_LM"
        targets = "all-linear" if peft is True else peft
        lora = LoraConfig(r=4, target_modules=targets, task_type=task, init_lora_weights=not objective.reads_teacher)
        model = get_peft_model(model, lora)
        model = model.to(dtype)
    (attach_scores if objective.scores else attach)(model)
    return model


def _reference(
    kind: str, objective: Objective, folder: Path, peft: bool, dtype: torch.dtype, tied: bool
) -> FrozenModel | AdapterOff | CachedLogps | Teachers | None:
    """A reference other than the policy where the policy is trained in full, so that the first step tells something."""
    if not objective.reads_reference(objective.config()):
        return None
    if kind == "adapter":
        return Teachers([AdapterOff()], [1.0], VOCABULARY) if objective.reads_teacher else AdapterOff()
    model = copy.deepcopy(_model(0 if peft else 1, dtype, tied, False))
    attach(model)
    if kind == "frozen":
        frozen = FrozenModel(model, "random")
        return Teachers([frozen], [1.0], VOCABULARY) if objective.reads_teacher else frozen
    cache = CachedLogps(folder / "cache", "random", "random")
    roles = [*roles_of(objective.family), *early_roles(objective)]
    for rows in (rows_for(objective), rows_for(objective, EVALUATED)):
        list(cache.fill(model, rows, roles, "tree", 4))
    cache.reload()
    return cache


def train(
    name: str,
    folder: Path,
    *,
    batch: int = ROWS_A_STEP,
    accumulation: int = 1,
    layout: str = "tree",
    impl: str = "chunked",
    reference: str = "frozen",
    peft: bool | list[str] = False,
    tied: bool = False,
    resume: bool = False,
    steps: int = STEPS,
    rows: int = STEPS * ROWS_A_STEP,
    dtype: torch.dtype = torch.float64,
) -> Trajectory:
    """Train the objective `name` with its default settings.

    Args:
        name: the objective.
        folder: for checkpoints and cached log-probs.
        batch, accumulation: rows a micro-batch, micro-batches a step.
        layout, impl: of the trainer.
        reference: frozen, adapter or cached.
        peft: train a LoRA adapter on every linear layer but the output head, or on these; the reference is the base.
        tied: output embeddings are the input embeddings.
        resume: continue from the checkpoint after step 2 that an earlier run left in `folder`.
        steps, rows: optimizer steps, and rows of an epoch.
        dtype: of the models.
    """
    objective = objective_named(name)
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        learning_rate=1e-2,
        optim="adamw_torch",
        adam_epsilon=1e-3,  # so that a parameter without gradient does not move by the sign of a rounding error
        logging_steps=1,
        save_steps=2,
        save_strategy="steps" if steps == STEPS else "no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        seed=1,
        **_joined(),
    )
    if args.deepspeed_plugin is not None:  # ZeRO-3 leaves small parameters whole, and all are small here
        args.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    trainer = Trainer(
        objective=objective,
        config=objective.config(),
        model=_policy(objective, peft, dtype, tied),
        args=args,
        reference=_reference(reference, objective, folder, peft, dtype, tied),
        layout=layout,
        starts_at_reference=peft and not objective.reads_teacher,
        impl=impl,
        train_dataset=rows_for(objective, rows),
    )
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    evaluated = trainer.evaluate(rows_for(objective, EVALUATED))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    timed = ("tokens_per_second", "memory_gib")
    return Trajectory(
        losses=[entry["loss"] for entry in logs],
        metrics=[{key: value for key, value in entry.items() if key not in timed} for entry in logs],
        evaluated={name: evaluated[name] for name in evaluated if not re.search("runtime|per_second|preparation|epoch", name)},
        parameters=torch.cat([_whole(parameter).flatten() for parameter in trainer.model.parameters()]),
    )


def _deepspeed() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


def _joined() -> dict[str, Any]:
    """The arguments with which processes without accelerators find each other."""
    if not _deepspeed():
        return {"use_cpu": True}  # this would turn DeepSpeed off
    AcceleratorState._reset_state()  # what DeepSpeed was told by the run before
    PartialState(backend="gloo")
    return {"accelerator_config": {"dispatch_batches": False, "use_configured_state": True}}


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    """A copy, gathered where ZeRO-3 cut it."""
    if "ds_id" not in vars(parameter):
        return parameter.detach().clone()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def varied(name: str) -> tuple[str, dict[str, Any]]:
    """An objective and settings of `train` from `name` or `name/variant`."""
    name, _, variant = name.partition("/")
    adapter, head = {"peft": True, "reference": "adapter"}, {"peft": ["q_proj", "lm_head"], "reference": "adapter"}
    return name, {"": {}, "adapter": adapter, "head": head, "tied": {"tied": True}}[variant]


def main() -> None:
    """Train each objective in these processes; the first writes its trajectory to `<folder>/<name>.pt`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rows", type=int, default=STEPS * ROWS_A_STEP)
    parser.add_argument("--batch", type=int, help="rows of a micro-batch; default: a step has one on each process")
    parser.add_argument("--dtype", default="float64")
    options = parser.parse_args()
    world = int(os.environ["WORLD_SIZE"])
    batch = options.batch or ROWS_A_STEP // world
    for seed, tied, scores in itertools.product((0, 1), (False, True), (False, True)):
        _model(
            seed, getattr(torch, options.dtype), tied, scores
        )  # now: where ZeRO-3 is known of, transformers cuts what it makes
    for name in options.names:
        objective, settings = varied(name)
        with tempfile.TemporaryDirectory() as scratch:
            trajectory = train(
                objective,
                Path(scratch),
                batch=batch,
                accumulation=ROWS_A_STEP // world // batch,
                steps=options.steps,
                rows=options.rows,
                dtype=getattr(torch, options.dtype),
                **settings,
            )
        if os.environ["RANK"] == "0":
            torch.save(vars(trajectory), options.folder / f"{name.replace('/', '-')}.pt")
    leave()


if __name__ == "__main__":
    main()
