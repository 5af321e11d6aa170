"""Training in iterations as the user wrote it: a recipe of a run, and what is sampled and judged between its trainings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import recipe as recipes
from .data import UNPAIRED
from .engines.build import refuse
from .recipe import ITERATED, Run, load_run
from .reference import reads_vocabulary
from .rewards import build
from .rewards.scorer import Preference, Reward
from .schema import UserError, parse
from .settings import (
    EngineConfig,
    IterationsConfig,
    ModelConfig,
    ReferenceConfig,
    RewardConfig,
    SamplingConfig,
    reward_values,
)
from .stats import columns_of, roles_of
from .written import merge, read, section, split, whence

OWN = (*ITERATED, "reward", "engine", "sampling")
"""Sections that are not those of the run that is trained."""

SHORT = {**recipes.SHORT, "preference": "name"}
"""Sections that may be one word."""

PREVIOUS = {"previous_chosen": "chosen", "previous_rejected": "rejected"}
"""Columns with the last iterate's log-probs of a role."""

COLUMNS: dict[str, tuple[str, ...]] = {
    "preference": (),
    **dict.fromkeys(PREVIOUS, ()),
    **dict.fromkeys(("score_chosen", "score_rejected"), ("reward",)),
    **dict.fromkeys(("chosen_win", "rejected_win"), ("everyone",)),
}
"""Numbers of a pair that can be made here -> what they take."""


@dataclass(frozen=True, kw_only=True)
class IterateRun:
    """Everything that decides a training in iterations."""

    run: Run
    """What is trained in each; its model is the start, its data are the prompts."""

    iterations: IterationsConfig
    """How many, and what happens in one."""

    preference: Mapping[str, Any]
    """Settings of who compares responses; empty: the reward does."""

    reward: RewardConfig
    """What a response is worth; no scorers: nobody says."""

    engine: EngineConfig
    """What samples the responses."""

    sampling: SamplingConfig
    """How they are sampled."""

    @property
    def output(self) -> Path:
        """The folder of everything."""
        return Path(self.run.train["output_dir"])

    @property
    def roles(self) -> list[str]:
        """What is learned from: `chosen` and `rejected`, or `completion` alone."""
        return ["chosen", "rejected"] if self.run.data.unpair else roles_of(self.run.objective.family)

    @property
    def columns(self) -> list[str]:
        """The numbers of a row that the objective reads."""
        return [] if self.run.data.unpair else list(columns_of(self.run.objective.family))

    @property
    def select(self) -> str:
        """How responses are ranked."""
        if self.iterations.select != "auto":
            return self.iterations.select
        if not self.preference:
            return "scores"
        return "tournament" if len(self.roles) == 2 else "everyone"

    def model(self, iterate: int) -> ModelConfig:
        """How an iterate is loaded; 0 is the start."""
        if iterate == 0:
            return self.run.model
        return dataclasses.replace(self.run.model, name=str(self.folder(iterate) / "model"))

    def folder(self, iteration: int) -> Path:
        """Where everything of an iteration is; 0 is the start."""
        return self.output / (f"iteration-{iteration}" if iteration else "start")

    def trained(self, iteration: int) -> Run:
        """The run that is trained in an iteration, from 1 on: from the last iterate, on the iteration's rows."""
        last, folder = self.model(iteration - 1), self.folder(iteration)
        run, reference = self.run, self.run.reference
        if run.objective.reads_reference(run.config):
            reference = self._reference(iteration)
        return dataclasses.replace(
            run,
            model=dataclasses.replace(last, merge=last.peft is not None),
            data=dataclasses.replace(
                run.data, name=str(folder / "rows.jsonl"), mixture=(), subset=None, split=None, columns={}, limit=None,
                eval=None, eval_size=0, format="auto", system=None,
            ),
            reference=reference,
            train={**run.train, "output_dir": str(folder / "model"), "eval_strategy": "no"},
        )  # fmt: skip

    def _reference(self, iteration: int) -> ReferenceConfig:
        """Where the reference's log-probs come from in an iteration."""
        reference, kind = self.run.reference, self.run.reference.kind
        if kind == "auto":
            kind = "frozen" if reads_vocabulary(self.run.objective, self.run.config) else "cached"
        if kind not in ("frozen", "cached"):
            return reference
        start = self.run.model.name if iteration > 1 and self.iterations.reference == "start" else None
        cache = str(self.folder(iteration) / "anchors") if kind == "cached" else None
        return dataclasses.replace(reference, kind=kind, model=reference.model or start, cache=reference.cache or cache)

    def resolved(self) -> dict[str, Any]:
        """What two commands that write one folder have to share, as JSON has it."""
        ours = ("objective", "model", "data", "reference", "layout")
        values = {name: entry for name, entry in self.run.resolved().items() if name in ours}
        values |= {"iterations": vars(self.iterations), "preference": dict(self.preference)}
        values |= {"reward": dataclasses.asdict(self.reward)}
        return json.loads(json.dumps(values | {"sampling": vars(self.sampling)}))


def load_iterate_run(recipe: str | Path | None = None, overrides: Sequence[str] = ()) -> IterateRun:
    """Read a training in iterations.

    Args:
        recipe: YAML file; None is an empty one.
        overrides: as in `load_run`.

    Raises:
        UserError: whatever is wrong with it, in one line.
    """
    changes = dict(map(split, overrides))
    mine = {f"{key}.{SHORT[key]}" if key in SHORT else key: text for key, text in changes.items() if key.split(".")[0] in OWN}
    theirs = [override for override in overrides if split(override)[0].split(".")[0] not in OWN]
    run = load_run(None, recipe, theirs, aside=OWN)
    file = read(recipe, (*recipes.SECTIONS, *ITERATED), SHORT)
    written = {key: value for key, value in file.items() if key in OWN}
    values, where = merge(written, mine), whence(recipe, written, mine)
    sections = {name: section(values, name, where, SHORT) for name in OWN}
    whole = IterateRun(
        run=run,
        iterations=parse(IterationsConfig, sections["iterations"], where("iterations")),
        preference=sections["preference"],
        reward=parse(RewardConfig, reward_values(sections["reward"]), where("reward")),
        engine=parse(EngineConfig, sections["engine"], where("engine")),
        sampling=parse(SamplingConfig, sections["sampling"], where("sampling")),
    )
    refuse(whole.engine, where("engine"))
    judges(whole)
    _refuse_objective(whole)
    _refuse_run(whole)
    return whole


def judges(run: IterateRun) -> tuple[Preference | None, Reward | None]:
    """Who compares and who scores; None where nobody does. Models are loaded at their first use.

    Raises:
        UserError: a setting of theirs is wrong, or there is neither.
    """
    if not run.preference and not run.reward.scorers:
        raise UserError("iterate: nobody judges the responses; give preference (who compares two) or reward (a score of each)")
    preference = build.preference(run.preference) if run.preference else None
    return preference, build.reward(run.reward) if run.reward.scorers else None


def _refuse_objective(run: IterateRun) -> None:
    """Methods that cannot learn from what is selected here."""
    method, name = run.run.objective, run.run.objective.name
    for wrong, message in (
        (method.reads_teacher, f"{name} has a teacher, which nobody is here"),
        (method.scores, f"{name} trains a model that scores, and writes nothing"),
        (run.run.data.unpair and [roles_of(method.family), list(columns_of(method.family))] != list(map(list, UNPAIRED)),
         f"data.unpair makes rows of a completion and its label, and {name} reads others; leave it out"),
        (len(run.roles) == 1 and run.select == "tournament",
         f"a tournament finds pairs, and {name} learns from the best response alone; select everyone or scores"),
        (run.select == "scores" and not run.reward.scorers, "select = scores needs a reward"),
        (run.iterations.at_least is not None and not run.reward.scorers, "iterations.at_least is a score and needs a reward"),
    ):  # fmt: skip
        if wrong:
            raise UserError(f"iterate: {message}")
    for column in run.columns:
        if column not in COLUMNS:
            more = "; data.unpair makes labels of pairs" if column == "label" else ""
            raise UserError(f"iterate: {name} reads {column!r} of each row. Possible here: {', '.join(COLUMNS)}{more}")
        for needed in COLUMNS[column]:
            if needed not in (run.select, "reward" if run.reward.scorers else None):
                what = "a reward" if needed == "reward" else f"iterations.select = {needed}"
                raise UserError(f"iterate: {name} reads {column!r} of each row, which takes {what}")


def _refuse_run(run: IterateRun) -> None:
    """Settings that contradict training in iterations, or would be ignored."""
    trained, reference = run.run, run.run.reference
    for wrong, message in (
        (trained.data.streaming, "data.streaming has no parts to deal out; leave it out"),
        (trained.model.revision, "model.revision: the start is read again in every iteration; give a folder"),
        (trained.train.get("push_to_hub"), "train.push_to_hub would push every iterate; push the last one yourself"),
        (trained.train.get("resume_from_checkpoint") is not None,
         "train.resume_from_checkpoint: the same command continues; leave it out"),
        (reference.kind == "adapter" and run.iterations.reference == "start",
         "reference.kind = adapter is the last iterate; give iterations.reference=previous, or frozen or cached"),
        (reference.model is not None and run.iterations.reference == "previous",
         "reference.model and iterations.reference = previous exclude each other"),
        (run.sampling.temperature == 0, "sampling.temperature = 0 makes all responses to a prompt the same"),
        (run.sampling.max_new_tokens >= trained.data.max_length,
         f"sampling.max_new_tokens = {run.sampling.max_new_tokens} leaves no room for a prompt in data.max_length = "
         f"{trained.data.max_length}"),
    ):  # fmt: skip
        if wrong:
            raise UserError(f"iterate: {message}")
