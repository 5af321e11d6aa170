"""The text of `posttrain show` and of help, read from the declarations: docstrings, fields, recipes. Imports no model code."""

from __future__ import annotations

import ast
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from . import arguments, registry, shipped
from .nested import Nested, nested_settings
from .schema import UserError, adapter, suggest
from .settings import (
    OF_DISTILLATION,
    DataConfig,
    EngineConfig,
    IterationsConfig,
    ModelConfig,
    ReferenceConfig,
    RewardConfig,
    RolloutsConfig,
    SamplingConfig,
    TeacherConfig,
)

_BOUNDS = (("exclusiveMinimum", ">"), ("minimum", ">="), ("exclusiveMaximum", "<"), ("maximum", "<="))


@dataclass(frozen=True)
class Option:
    """One setting as help shows it."""

    flag: str
    """`--beta`, `--model.dtype`, ..."""

    type: str
    """In words: `number > 0`, `drop|error`, ..."""

    default: str
    """As YAML writes it, or `required`."""

    description: str
    """The docstring under the field."""


def options(kind: type, section: str = "") -> list[Option]:
    """The settings of a dataclass; `section` prefixes their flags (`model` -> `--model.dtype`, and `--model` for its name)."""
    schema = adapter(kind).json_schema()
    defaults = {field.name: _default(field) for field in dataclasses.fields(kind)}
    nested = nested_settings(kind)
    rows = []
    for name, entry in schema["properties"].items():
        flag = f"--{section}.{name}" if section else f"--{name}"
        if (section, name) in (
            ("model", "name"),
            ("data", "name"),
            ("engine", "kind"),
            ("teacher", "model"),
            ("reward", "scorers"),
        ):
            flag = f"--{section}"
        required = name in schema.get("required", ())
        default = "required" if required else _yaml(defaults[name])
        description = " ".join(entry.get("description", "").split())
        if "examples" in entry:
            description += f" Possible: {', '.join(entry['examples'])}."
        if name in nested:
            rows += _nested(nested[name], flag, description)
            continue
        rows.append(Option(flag, _type(entry, schema), default, description))
    return rows


def _nested(setting: Nested, flag: str, description: str) -> list[Option]:
    """Of a setting that is an objective: the names it takes, and the settings of its default."""
    default, config = setting.find({})
    description += (
        f" Its own settings are {flag}.<setting>; those of {default.name} follow, `posttrain show <name>` has others'."
    )
    rows = [Option(f"{flag}.name", "|".join(setting.possible()), default.name, description)]
    for row, value in zip(options(default.config, flag.removeprefix("--")), vars(config).values(), strict=True):
        rows.append(dataclasses.replace(row, default=_yaml(value)))
    return rows


def sections(objective: registry.Objective) -> dict[str, list[Option]]:
    """Every flag of an objective's command, by the section of the recipe it belongs to."""
    found = {
        f"{objective.name} (objective)": options(objective.config),
        "model": options(ModelConfig, "model"),
        "data": options(DataConfig, "data"),
    }
    if objective.online:
        found["reward"] = options(RewardConfig, "reward")
    if objective.reads_teacher:
        found["teacher"] = options(TeacherConfig, "teacher")
    if objective.reads_teacher or objective.online:
        mine = {f"--rollouts.{name}" for name in OF_DISTILLATION}
        found["rollouts"] = [
            row for row in options(RolloutsConfig, "rollouts") if (row.flag in mine) is objective.reads_teacher
        ]
        found["sampling"] = options(SamplingConfig, "sampling")
        found["engine"] = options(EngineConfig, "engine")
    if not objective.reads_teacher and objective.reads_reference(objective.config()):
        found["reference"] = options(ReferenceConfig, "reference")
    return found


_RUN_OPTIONS = {
    "sample": [
        Option("--output", "text", "required", "File of JSON lines; a run that was interrupted goes on where it ends."),
        Option("--n", "integer > 0", "1", "Completions of each prompt."),
    ],
    "eval": [
        Option("--output", "text", "required", "Folder of samples and numbers; an interrupted evaluation goes on."),
        Option("--reference", "text", "null", "Model to compare with; --reference.revision and so on as for --model."),
        Option("--n", "integer > 0", "1", "Completions of each prompt."),
        Option(
            "--similarity", "integer >= 0", "0", "Prompts whose first completions are compared by METEOR (extra `similarity`)."
        ),
        Option("--batch_size", "integer > 0", "16", "Completions whose KL is computed at a time."),
    ],
}
"""What `posttrain sample` and `posttrain eval` take beside their sections."""


def sampling_sections(command: str) -> dict[str, list[Option]]:
    """Every flag of `posttrain sample` or `posttrain eval`, by section."""
    reward = {"reward": options(RewardConfig, "reward")} if command == "eval" else {}
    return {
        "run": _RUN_OPTIONS[command],
        **reward,
        "sampling": options(SamplingConfig),
        "engine": options(EngineConfig, "engine"),
        "model": options(ModelConfig, "model"),
        "data": options(DataConfig, "data"),
    }


def iteration_sections() -> dict[str, list[Option]]:
    """Every flag of `posttrain iterate` beside those of the objective's own command, by section."""
    name = Option("--preference, --reward", "text", "none", "By name: length, vader, model, pairs, ..., or module:function.")
    return {
        "iterations": options(IterationsConfig, "iterations"),
        "preference (who compares two responses) and reward (a score of each); one is needed": [name],
        "sampling": options(SamplingConfig, "sampling"),
        "engine": options(EngineConfig, "engine"),
    }


def train_defaults() -> list[Option]:
    """The arguments of TrainingArguments whose default is ours."""
    return [Option(f"--train.{name}", "", _yaml(value), reason) for name, (value, reason) in arguments.DEFAULTS.items()]


def summaries() -> dict[str, str]:
    """Each objective of the package with the first line of its file; nothing is imported."""
    lines = {}
    for name, module in registry.names().items():
        path = Path(__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
        document = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines[name] = document.split("\n")[0]
    return lines


def recipes() -> dict[Path, str]:
    """The recipes that come with the toolkit, with the objective of each."""
    root = shipped.folder("recipes")
    found = {}
    for path in sorted(root.glob("**/*.yaml")):
        objective = yaml.safe_load(path.read_text(encoding="utf-8"))["objective"]
        found[path] = objective if isinstance(objective, str) else objective["name"]
    return found


def show_list() -> str:
    """The objectives, one line each."""
    lines = summaries()
    width = max(map(len, lines))
    body = "\n".join(f"  {name:<{width}}  {line}" for name, line in lines.items())
    return f"Objectives (posttrain show <objective> for its equation, settings and recipes):\n{body}"


def show(name: str) -> str:
    """One objective: equation and source, settings, recipes. `train` shows the arguments of the trainer.

    Raises:
        UserError: there is none of that name.
    """
    if name == "train":
        return _show_train()
    try:
        objective = registry.find(name)
    except UserError:
        possible = [*registry.names(), "train"]
        raise UserError(f"nothing to show for {name!r}{suggest(name, possible)} Possible: {', '.join(possible)}") from None
    reads = "reads the reference" if objective.reads_reference(objective.config()) else "reads no reference"
    reads = "has a teacher" if objective.reads_teacher else reads
    family = "Prompts alone; it samples their completions." if objective.online else _sentence(objective.family)
    parts = [objective.document, f"Data: {family} {objective.name} {reads}.", "Settings:"]
    parts += [table(options(objective.config))]
    found = "\n".join(f"  {path}\n    {_first_comment(path)}" for path, its in recipes().items() if its == objective.name)
    parts.append(f"Recipes:\n{found}" if found else f"Recipes: recipes/{objective.name} of the repository")
    return "\n\n".join(parts)


def table(rows: list[Option]) -> str:
    """Options one under the other, in plain text."""
    return "\n".join(f"  {row.flag}  {row.type}  [{row.default}]\n      {row.description}" for row in rows)


def _show_train() -> str:
    from transformers import TrainingArguments

    theirs = {field.name: _default(field) for field in dataclasses.fields(TrainingArguments)}
    lines = ["Arguments of transformers.TrainingArguments (described there). Where the default is ours:"]
    lines += [f"  train.{o.flag[8:]} = {o.default}  ({o.description})" for o in train_defaults()]
    lines += ["", "Refused, because this trainer would ignore them:"]
    lines += [f"  train.{name}: {reason}" for name, (_, reason) in arguments.REFUSED.items()]
    lines += ["", "All others, with transformers' default:"]
    skip = {*arguments.DEFAULTS, *arguments.REFUSED}
    lines += [f"  train.{name} = {_yaml(value)}" for name, value in theirs.items() if name not in skip]
    return "\n".join(lines)


def _default(field: dataclasses.Field[Any]) -> Any:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return list(value) if isinstance(value, tuple) else value


def _sentence(kind: type) -> str:
    return " ".join((kind.__doc__ or "").split("\n\n")[0].split())


def _first_comment(path: Path) -> str:
    return path.read_text(encoding="utf-8").split("\n")[0].lstrip("# ")


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).strip()
    return text.removesuffix("...").strip()


def _type(entry: dict[str, Any], schema: dict[str, Any]) -> str:
    """A JSON schema entry in a few words."""
    if "$ref" in entry:
        return _type(schema["$defs"][entry["$ref"].split("/")[-1]], schema)
    if "anyOf" in entry:
        return " or ".join(dict.fromkeys(_type(one, schema) for one in entry["anyOf"]))
    if "enum" in entry:
        return "|".join(map(str, entry["enum"]))
    if "pattern" in entry:
        return entry["title"]
    if "const" in entry:
        return str(entry["const"])
    if entry.get("type") == "array":
        return f"list of {_type(entry['items'], schema)}" if entry.get("items") else "list"
    words = {"string": "text", "boolean": "true|false", "object": "mapping", "null": "null"}
    name = words.get(entry.get("type", ""), entry.get("type", "value"))
    bounds = " and ".join(f"{sign} {entry[key]:g}" for key, sign in _BOUNDS if key in entry)
    return f"{name} {bounds}".rstrip()
