"""A short training of a tiny random model, for any objective: what the invariants compare.

As a program it trains every objective named on its command line in the processes that torchrun started, and writes the
trajectories: `torchrun --nproc-per-node 2 trajectory.py FOLDER NAME...`.
"""

from __future__ import annotations

import copy
import functools
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import VOCABULARY, tiny
from transformers import TrainingArguments

from posttrain.mismatch import Mismatched, early_roles, lenders
from posttrain.models import attach
from posttrain.reference import AdapterOff, CachedLogps, FrozenModel, Teachers
from posttrain.registry import Objective, find
from posttrain.stats import Loss, Pairs, columns_of, roles_of
from posttrain.trainer import Trainer

STEPS = 4
ROWS_A_STEP = 4


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

    parameters: torch.Tensor
    """All parameters at the end, in one vector."""


def objective_named(name: str) -> Objective:
    """The objective of the package, or the probe."""
    return PROBE if name == PROBE.name else find(name)


def rows_for(objective: Objective) -> Sequence[dict[str, Any]] | Mismatched:
    """Rows of one epoch: prompts of 2 to 9 tokens, one completion of 1 to 7 tokens a role, columns of zeros and ones."""
    generator = np.random.default_rng(0)

    def ids(low: int, high: int) -> list[int]:
        return generator.integers(3, VOCABULARY, generator.integers(low, high)).tolist()

    rows = [
        {"prompt": ids(2, 10)}
        | {role: [ids(1, 8)] for role in roles_of(objective.family)}
        | {column: int(generator.integers(2)) for column in columns_of(objective.family)}
        for _ in range(STEPS * ROWS_A_STEP)
    ]
    early = early_roles(objective)
    return Mismatched(rows, lenders([row["prompt"] for row in rows], 0, "rows"), early, 64) if early else rows


@functools.cache
def _model(seed: int) -> torch.nn.Module:
    return tiny("llama", dtype=torch.float64, seed=seed)


def _policy(peft: bool, apart: bool) -> torch.nn.Module:
    """The policy; an adapter starts as its base, unless `apart` (a student that equals its teacher learns nothing)."""
    model = copy.deepcopy(_model(0))
    if peft:
        torch.manual_seed(0)
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=not apart)
        model = get_peft_model(model, lora)
        model = model.to(torch.float64)
    attach(model)
    return model


def _reference(
    kind: str, objective: Objective, folder: Path, peft: bool
) -> FrozenModel | AdapterOff | CachedLogps | Teachers | None:
    """A reference other than the policy where the policy is trained in full, so that the first step tells something."""
    if not objective.reads_reference(objective.config()):
        return None
    if kind == "adapter":
        return Teachers([AdapterOff()], [1.0], VOCABULARY) if objective.reads_teacher else AdapterOff()
    model = copy.deepcopy(_model(0 if peft else 1))
    attach(model)
    if kind == "frozen":
        frozen = FrozenModel(model, "random")
        return Teachers([frozen], [1.0], VOCABULARY) if objective.reads_teacher else frozen
    cache = CachedLogps(folder / "cache", "random", "random")
    list(cache.fill(model, rows_for(objective), [*roles_of(objective.family), *early_roles(objective)], "tree", 4))
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
    peft: bool = False,
    resume: bool = False,
) -> Trajectory:
    """Train the objective `name` with its default settings for 4 optimizer steps of 4 rows, in float64.

    Args:
        name: the objective.
        folder: for checkpoints and cached log-probs.
        batch, accumulation: rows a micro-batch, micro-batches a step.
        layout, impl: of the trainer.
        reference: frozen, adapter or cached.
        peft: train a LoRA adapter on every linear layer, the reference being the base.
        resume: continue from the checkpoint after step 2 that an earlier run left in `folder`.
    """
    objective = objective_named(name)
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=STEPS,
        learning_rate=1e-2,
        adam_epsilon=1e-3,  # so that a parameter without gradient does not move by the sign of a rounding error
        logging_steps=1,
        save_steps=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        seed=1,
    )
    trainer = Trainer(
        objective=objective,
        config=objective.config(),
        model=_policy(peft, objective.reads_teacher),
        args=args,
        reference=_reference(reference, objective, folder, peft),
        layout=layout,
        starts_at_reference=peft and not objective.reads_teacher,
        impl=impl,
        train_dataset=rows_for(objective),
    )
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    timed = ("tokens_per_second", "memory_gib")
    return Trajectory(
        losses=[entry["loss"] for entry in steps],
        metrics=[{key: value for key, value in entry.items() if key not in timed} for entry in steps],
        parameters=torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]),
    )


def main(folder: Path, names: list[str]) -> None:
    """Train each objective in these processes; the first writes its trajectory to `<folder>/<name>.pt`."""
    for name in names:
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 2
        with tempfile.TemporaryDirectory() as scratch:
            trajectory = train(name, Path(scratch), batch=ROWS_A_STEP // world)
        if torch.distributed.get_rank() == 0:
            torch.save(vars(trajectory), folder / f"{name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
