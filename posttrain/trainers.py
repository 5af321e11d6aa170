"""Which trainer a run has: one that learns from the data, from rollouts beside a teacher, or from rounds of rollouts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from .engines.build import build as build_engine
from .engines.build import ends_of
from .engines.build import refuse as refuse_engine
from .engines.rollout import Engine
from .experience import nothing
from .online import OnlineTrainer
from .recipe import Run
from .rewards.build import reward
from .settings import GROUP, RolloutsConfig
from .steps import StepTrainer
from .trainer import Trainer


def refuse(run: Run) -> None:
    """Refuse settings of engine and reward before anything is loaded.

    Raises:
        UserError: a setting that an engine would ignore, a scorer that there is not, or what the objective itself refuses.
    """
    refuse_engine(run.engine)
    if run.objective.online:
        reward(run.reward)
        state = {} if run.objective.state is None else run.objective.state(run.config, {}, {})
        run.objective.lesson(run.config, nothing(run.rollouts.group_size or GROUP, {"progress": 0.0, **state}))


def describe(run: Run) -> dict[str, str]:
    """What an online run samples and how it is judged, in words; nothing of any other."""
    if not run.objective.online:
        return {}
    rollouts, weights = run.rollouts, [(one["name"], one.get("weight", 1)) for one in run.reward.scorers]
    judged = " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in weights)
    heldout = "" if run.reward.heldout is None else f"; only logged: {run.reward.heldout['name']}"
    every, epochs = rollouts.every or 1, rollouts.epochs or 1
    round_ = "every step" if every == 1 else f"every {every} steps"
    again = "" if epochs == 1 else f", learned from {epochs} times"
    where = run.engine.kind + (f" at {run.engine.url}" if run.engine.url else "")
    size = f"{rollouts.group_size or GROUP} completions of each prompt, up to {run.sampling.max_new_tokens} tokens"
    return {"reward": f"{judged}{heldout}", "rollouts": f"{size}, sampled by {where} {round_}{again}"}


def build(run: Run, tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> Trainer:
    """The trainer of a run.

    Args:
        run: its settings.
        tokenizer: of the policy.
        kwargs: those of `Trainer`.

    Raises:
        UserError: as `Trainer`; or a reward that cannot be had.
    """
    if not run.objective.online and run.rollouts == RolloutsConfig():
        return Trainer(**kwargs)

    def engine(policy: Callable[[], nn.Module]) -> Engine:
        folder = Path(run.train["output_dir"]) / ".weights"
        compute = trainer.compute_loss_context_manager
        return build_engine(run.engine, run.sampling, run.model, tokenizer, model=policy, folder=folder, compute=compute)

    sampled = {"rollouts": run.rollouts, "sampling": run.sampling, "engine": engine, **kwargs}
    if run.objective.online:
        trainer: Trainer = StepTrainer(reward=reward(run.reward), **sampled)
    else:
        trainer = OnlineTrainer(ends=ends_of(run.model, tokenizer), pad=tokenizer.pad_token_id, **sampled)
    return trainer
