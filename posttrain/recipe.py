"""A run as the user wrote it: a recipe (YAML), flags and `key=value` overrides, read by one strict parser."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args

from omegaconf import OmegaConf

from . import arguments
from .registry import Objective, find
from .schema import UserError, parse, suggest
from .settings import (
    OF_DISTILLATION,
    DataConfig,
    EngineConfig,
    ModelConfig,
    ReferenceConfig,
    RewardConfig,
    RolloutsConfig,
    SamplingConfig,
    TeacherConfig,
    reward_values,
)
from .written import merge, read, section, split, whence

Layout = Literal["auto", "tree", "separate"]
NonFinite = Literal["stop", "skip", "go_on"]

CHOICES = {"layout": Layout, "nonfinite": NonFinite}
"""Keys of a recipe that are one word of several; the first is the default."""

SHORT = {
    "objective": "name",
    "model": "name",
    "data": "name",
    "reference": "kind",
    "teacher": "model",
    "reward": "name",
    "engine": "kind",
}
"""Sections that may be written as one word: `model: X` is `model: {name: X}`, `--reference cached` is reference.kind."""

SECTIONS = (*SHORT, "rollouts", "sampling", "layout", "nonfinite", "train", "imports")
"""The keys of a recipe."""

KINDS = {
    "model": ModelConfig,
    "data": DataConfig,
    "reference": ReferenceConfig,
    "teacher": TeacherConfig,
    "rollouts": RolloutsConfig,
    "reward": RewardConfig,
    "engine": EngineConfig,
    "sampling": SamplingConfig,
}
"""Sections with settings of their own, and what declares these."""

ITERATED = ("iterations", "preference")
"""The keys that make it one of `posttrain iterate`."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that decides a run."""

    objective: Objective
    """The method."""

    config: Any
    """Its settings."""

    model: ModelConfig
    """The model that is trained."""

    data: DataConfig
    """What it is trained on."""

    reference: ReferenceConfig = dataclasses.field(default_factory=ReferenceConfig)
    """Where the reference's log-probs come from."""

    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    """Who teaches, for a distillation."""

    rollouts: RolloutsConfig = dataclasses.field(default_factory=RolloutsConfig)
    """Which completions the models write themselves."""

    reward: RewardConfig = dataclasses.field(default_factory=RewardConfig)
    """What they are worth, for an online method."""

    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    """What samples them."""

    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    """How they are sampled."""

    layout: Layout = "auto"
    """How prompts and completions are laid out: tree shares a prompt among its completions, separate repeats it; auto shares
    where it is exact."""

    nonfinite: NonFinite = "stop"
    """A loss or gradient that is not finite: stop ends the run with the batch saved for inspection, skip leaves the step out,
    go_on takes it."""

    train: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of transformers.TrainingArguments: what the user gave, and our defaults."""

    imports: tuple[str, ...] = ()
    """Modules imported first; they may register further objectives."""

    def resolved(self) -> dict[str, Any]:
        """The complete run as a mapping of plain values that reads back as a recipe; secrets are left out."""
        return {
            "objective": {"name": self.objective.name, **dataclasses.asdict(self.config)},
            "model": dataclasses.asdict(self.model),
            "data": dataclasses.asdict(self.data),
            "reference": dataclasses.asdict(self.reference),
            "teacher": dataclasses.asdict(self.teacher),
            "rollouts": dataclasses.asdict(self.rollouts),
            "reward": None if self.reward == RewardConfig() else dataclasses.asdict(self.reward),
            "engine": dataclasses.asdict(self.engine),
            "sampling": dataclasses.asdict(self.sampling),
            "layout": self.layout,
            "nonfinite": self.nonfinite,
            "imports": list(self.imports),
            "train": {key: _plain(value) for key, value in self.train.items() if not _withheld(key, value)},
        }


def load_run(
    objective: str | None = None,
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
    aside: Sequence[str] = (),
) -> Run:
    """Read a run.

    Args:
        objective: its name, where the command gives it; else the recipe or an override does.
        recipe: YAML file; None is an empty one.
        overrides: `key=value` with dotted keys, values in YAML; keys of the objective may stand without `objective.`.
        aside: sections of the file that are another reader's.

    Raises:
        UserError: whatever is wrong with it, in one line.
    """
    written = {key: value for key, value in read(recipe, (*SECTIONS, *ITERATED), SHORT).items() if key not in aside}
    if other := [key for key in ITERATED if key in written]:
        raise UserError(f"{recipe}: {other[0]} is for training in iterations: posttrain iterate {recipe}")
    changes = [split(override) for override in overrides]
    _import(written, changes)
    method = find(_objective_name(objective, written, changes, recipe))
    keys = {_full_key(key, method): value for key, value in changes}
    values = merge(written, keys)
    values.setdefault("objective", {})["name"] = method.name

    where = whence(recipe, written, keys)
    config = {key: value for key, value in section(values, "objective", where, SHORT).items() if key != "name"}
    for key, choice in CHOICES.items():
        if key in values and values[key] not in get_args(choice):
            raise UserError(f"{where(key)} = {values[key]!r}; possible: {', '.join(get_args(choice))}")
    sections = {name: section(values, name, where, SHORT) for name in KINDS}
    sections["reward"] = reward_values(sections["reward"])
    parsed = {name: parse(kind, sections[name], where(name)) for name, kind in KINDS.items()}
    run = Run(
        objective=method,
        config=parse(method.config, config, where("objective")),
        **parsed,
        layout=values.get("layout", "auto"),
        nonfinite=values.get("nonfinite", "stop"),
        train=arguments.parse_train(section(values, "train", where, SHORT), where("train")),
        imports=tuple(values.get("imports") or ()),
    )
    if aside and method.online:
        raise UserError(f"iterate: {method.name} samples within its training already: posttrain train")
    _refuse_contradictions(run)
    return dataclasses.replace(run, train=_with_defaults(run))


def _import(written: Mapping[str, Any], changes: Sequence[tuple[str, str]]) -> None:
    modules = OmegaConf.create({"imports": written.get("imports", [])})
    modules.merge_with_dotlist([f"imports={value}" for key, value in changes if key == "imports"])
    names = OmegaConf.to_container(modules)["imports"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"imports = {names!r}: a list of Python modules is expected")
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"imports: {name} cannot be imported: {error}") from None


def _objective_name(
    given: str | None, written: Mapping[str, Any], changes: Sequence[tuple[str, str]], recipe: str | Path | None
) -> str:
    changed = [value for key, value in changes if key in ("objective", "objective.name")]
    in_recipe = written.get("objective", {}).get("name")
    asked = changed[-1] if changed else in_recipe
    if given is None and asked is None:
        raise UserError(f"{recipe or 'run'}: objective.name is required (posttrain show lists the objectives)")
    if given is not None and asked not in (None, given):
        source = "objective.name" if changed else str(recipe)
        raise UserError(f"{source} says {asked}, the command says {given}; use posttrain {asked} or posttrain train")
    return str(given or asked)


def _full_key(key: str, method: Objective) -> str:
    """The dotted key of a recipe that a flag or an override stands for."""
    head = key.split(".")[0]
    if head in SECTIONS:
        return f"{key}.{SHORT[key]}" if key in SHORT else key
    settings = [field.name for field in dataclasses.fields(method.config)]
    if head in settings:
        return f"objective.{key}"
    possible = [*settings, *SECTIONS]
    inside = [f"{name}.{field.name}" for name, kind in KINDS.items() for field in dataclasses.fields(kind)]
    train = dict.fromkeys([*arguments.DEFAULTS, *arguments.types()])  # those first that runs mostly give
    inside += [f"train.{name}" for name in train if name not in arguments.REFUSED]
    near = suggest(head, [*possible, *inside])
    raise UserError(f"unknown setting {key!r}{near} Possible: {', '.join(possible)} (posttrain {method.name} --help)")


def _refuse_contradictions(run: Run) -> None:
    _refuse_teacher(run)
    _refuse_rollouts(run)
    _refuse_reference(run)
    if run.model.merge and run.model.peft is None:
        raise UserError("model: merge = True merges an adapter, and model.peft gives none")
    if run.train.get("eval_strategy", "no") != "no" and not _evaluates(run):
        raise UserError(f"train: eval_strategy = {run.train['eval_strategy']!r} needs rows: give data.eval or data.eval_size")


def _refuse_reference(run: Run) -> None:
    reference = run.reference
    if not run.objective.reads_reference(run.config) and reference != ReferenceConfig():
        raise UserError(f"reference: {run.objective.name} reads no reference; leave the section out")
    if reference.kind == "adapter" and run.model.peft is None:
        raise UserError("reference: kind = adapter needs an adapter to switch off: give model.peft, or use frozen or cached")
    if reference.kind == "adapter" and reference.model is not None:
        raise UserError("reference: model is the policy itself where kind = adapter; use frozen or cached for another model")
    if reference.kind == "cached" and run.objective.online:
        raise UserError(f"reference: {run.objective.name} samples its completions, so none of their log-probs can be cached")
    if reference.kind == "ema" and run.model.peft is not None:
        raise UserError("reference: kind = ema averages all weights, and model.peft trains an adapter; use adapter or frozen")
    if reference.kind == "soup" and len(reference.models) < 2:
        raise UserError("reference: kind = soup needs reference.models, a list of two or more checkpoints")
    belongs = {"rate": "ema", "period": "ema", "models": "soup"}
    for name, kind in belongs.items():
        if vars(reference)[name] not in (None, ()) and reference.kind != kind:
            raise UserError(f"reference.{name} is for kind = {kind} and would be ignored by {reference.kind}; leave it out")
    if reference.model is not None and reference.kind == "soup":
        raise UserError("reference.model would be ignored by kind = soup, which reads reference.models; leave it out")


def _refuse_teacher(run: Run) -> None:
    method, teacher = run.objective, run.teacher
    if not method.reads_teacher:
        if teacher != TeacherConfig():
            raise UserError(f"teacher: {method.name} has no teacher; leave the section out (methods of distillation have one)")
        return
    if run.reference != ReferenceConfig():
        raise UserError(f"reference: {method.name} compares with a teacher; give teacher in place of reference")
    if teacher.kind == "adapter" and teacher.model:
        raise UserError("teacher: model is the student itself where kind = adapter; leave one of the two out")
    if teacher.kind == "adapter" and run.model.peft is None:
        raise UserError("teacher: kind = adapter needs an adapter to switch off: give model.peft, or a teacher.model")
    own = teacher.kind in ("adapter", "served") or (teacher.kind == "cached" and run.model.peft is not None)
    if not own and not teacher.model:
        raise UserError(
            f"teacher: model is required by {method.name}: a hub id or folder (--teacher X); "
            "or kind = adapter, the student with its adapter off"
        )
    _refuse_kept_teacher(teacher)


def _refuse_kept_teacher(teacher: TeacherConfig) -> None:
    """Settings of cached and served teachers that are missing or would be ignored."""
    if teacher.kind == "served" and teacher.url is None:
        raise UserError("teacher: kind = served needs teacher.url, the address of a vLLM server, such as http://localhost:8000")
    if teacher.kind in ("cached", "served") and len(teacher.model) > 1:
        raise UserError(f"teacher: kind = {teacher.kind} takes one teacher, and model names {len(teacher.model)}")
    belongs = dict.fromkeys(("url", "timeout", "retries"), ("served",)) | {"cache": ("cached", "served")}
    belongs |= dict.fromkeys(("dtype", "attention", "trust_remote_code"), ("auto", "model", "cached"))
    plain = TeacherConfig()
    for name, kinds in belongs.items():
        if vars(teacher)[name] != vars(plain)[name] and teacher.kind not in kinds:
            meant = " and ".join(kinds[-2:])
            raise UserError(f"teacher.{name} is for kind = {meant} and would be ignored by {teacher.kind}; leave it out")


def _refuse_rollouts(run: Run) -> None:
    method, plain = run.objective, RolloutsConfig()
    given = [name for name, value in vars(run.rollouts).items() if value != vars(plain)[name]]
    if method.online:
        return _refuse_online(run, given)
    if run.reward != RewardConfig():
        raise UserError(f"reward: {method.name} learns from completions of the data and reads no reward; leave the section out")
    if not given:
        if run.engine != EngineConfig() or run.sampling != SamplingConfig():
            raise UserError(
                "engine, sampling: nothing is sampled; give rollouts.student or rollouts.teacher a share, or leave them out"
            )
        return
    if not method.reads_teacher:
        raise UserError(f"rollouts: {method.name} compares completions of the data; methods of distillation take rollouts")
    if wrong := [name for name in given if name not in OF_DISTILLATION]:
        raise UserError(f"rollouts.{wrong[0]} is for online methods and would be ignored by {method.name}; leave it out")
    if run.rollouts.corrections and run.sampling.stop:
        raise UserError("sampling: stop would be looked for in what follows a correction alone; leave rollouts.corrections out")
    _refuse_file(run)


def _refuse_online(run: Run, given: Sequence[str]) -> None:
    """What a method that samples its completions cannot do without, or would ignore."""
    name = run.objective.name
    if wrong := [setting for setting in given if setting in OF_DISTILLATION]:
        raise UserError(f"rollouts.{wrong[0]} is for methods of distillation and would be ignored by {name}; leave it out")
    if not run.reward.scorers:
        raise UserError(f"reward: {name} needs one, such as --reward vader, or {{name: answer, column: answer}}")
    if run.sampling.temperature == 0:
        raise UserError("sampling: temperature = 0 always writes the same completion, which nothing can be learned from")
    if run.data.unpair:
        raise UserError(f"data: unpair = true makes rows of completions; {name} reads prompts alone")
    rounds = (run.rollouts.every or 1) * (run.rollouts.epochs or 1)
    if rounds > 1 and str(run.train.get("ignore_data_skip", False)).lower() == "true":
        raise UserError("train: ignore_data_skip would continue in the middle of a round of rollouts with other prompts")
    _refuse_file(run)


def _refuse_file(run: Run) -> None:
    if run.engine.kind == "file":
        raise UserError("engine: kind = file holds completions sampled before; give them as data. Possible here: hf, vllm")


def _evaluates(run: Run) -> bool:
    return run.data.eval is not None or run.data.eval_size > 0


def _with_defaults(run: Run) -> dict[str, Any]:
    """What the user gave under `train:`, then our defaults for the rest."""
    train = {name: value for name, (value, _) in arguments.DEFAULTS.items()} | dict(run.train)
    if not _evaluates(run):
        train["eval_strategy"] = "no"
    if train["output_dir"] in (None, arguments.OUTPUT_DIR):
        names = (run.objective.name, run.model.name, run.data.name or "mixture")
        train["output_dir"] = "runs/" + "-".join(Path(name).name.removesuffix(Path(name).suffix) or name for name in names)
    return train


def _withheld(key: str, value: Any) -> bool:
    """Secrets, and what waits for the device to be known."""
    return key.endswith("token") or value == arguments.WHERE_AVAILABLE


def _plain(value: Any) -> Any:
    """A value as JSON has it (TrainingArguments' enumerations are strings)."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value.value if isinstance(value, Enum) else value
