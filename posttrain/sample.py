"""`posttrain sample`: completions of the prompts of a data set, as JSON lines that engines/file.py reads, and other programs.

A line is a prompt: its `row` in the data, `prompt` and `completions` as text, `prompt_ids` and `completion_ids`, `logps` per
token, `finished`, the `version` of the weights, and `asked`, the prompt as the data have it (text or messages). A run that was
interrupted goes on where the file ends. The file is then that of a run which was not: randomness belongs to the row, and the
rows that are sampled together are always the same.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn
from transformers import PreTrainedTokenizerBase

from . import console, data
from .conversations import Text
from .engines.build import build, refuse
from .engines.rollout import Engine, Rollout, derived, text_of, truncation_warning
from .models import load_model, load_tokenizer
from .records import first_difference
from .schema import PositiveInt, UserError, parse, suggest
from .settings import DataConfig, EngineConfig, ModelConfig, SamplingConfig
from .written import merge, read, section, split, whence

SHORT = {"model": "name", "data": "name", "engine": "kind"}
"""Sections that may be one word."""

SECTIONS = (*SHORT, "sampling", "n", "output")
"""The keys of a recipe for sampling."""

KINDS = {"model": ModelConfig, "data": DataConfig, "engine": EngineConfig, "sampling": SamplingConfig}
"""Sections, and what declares their settings."""

_SPEED = {"engine": ("batch_size", "url", "timeout", "retries", "options"), "data": ("num_proc",)}
"""Settings that change how fast completions come and not which."""


@dataclass(frozen=True, kw_only=True)
class SampleRun:
    """Everything that decides what is sampled."""

    model: ModelConfig
    """What samples."""

    data: DataConfig
    """Whose prompts are continued."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    """How."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """From which distribution."""

    n: PositiveInt = 1
    """Completions of each prompt."""

    output: str
    """File that the lines are added to; beside it, with .json added to its name, are the settings."""

    def identity(self) -> dict[str, Any]:
        """What two runs that write one file have to share."""
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        del values["output"]
        for name, keys in _SPEED.items():
            values[name] = {key: value for key, value in values[name].items() if key not in keys}
        return values


def load_sample_run(recipe: str | Path | None = None, overrides: Sequence[str] = ()) -> SampleRun:
    """Read the settings of a sampling run; settings of `sampling` may stand without that word.

    Raises:
        UserError: whatever is wrong with them, in one line.
    """
    written = read(recipe, SECTIONS, SHORT)
    changes = {full_key(key, SECTIONS, SHORT): value for key, value in map(split, overrides)}
    values = merge(written, changes)
    where = whence(recipe, written, changes)
    parsed = {name: parse(kind, section(values, name, where, SHORT), where(name)) for name, kind in KINDS.items()}
    run = parse(SampleRun, {**parsed, **{key: values[key] for key in ("n", "output") if key in values}}, "sample")
    refuse_unsampled(run, where("engine"))
    return run


def refuse_unsampled(run: SampleRun, where: str, what: str = "sample") -> None:
    """Refuse settings that would be ignored.

    Args:
        where: how errors call the engine.
        what: how they call the command.
    """
    refuse(run.engine, where)
    for wrong, message in (
        (
            run.model.peft is not None,
            "model.peft makes a new adapter, which changes nothing; model takes a trained one's folder",
        ),
        (
            run.data.eval is not None or run.data.eval_size > 0,
            "data.eval and data.eval_size hold out rows, and none is trained on",
        ),
        (run.data.mixture, "data.mixture draws rows at random; sample each set by itself"),
        (run.data.streaming, "data.streaming cannot go on where a file ends"),
    ):
        if wrong:
            raise UserError(f"{what}: {message}; leave it out")


def full_key(key: str, sections: Sequence[str], short: Mapping[str, str]) -> str:
    """The dotted key that a flag stands for, where settings of `sampling` may stand without that word.

    Args:
        key: as written.
        sections: the keys of the recipe.
        short: sections that may be one word -> the setting it is.

    Raises:
        UserError: there is no such setting.
    """
    head = key.split(".")[0]
    if head in sections:
        return f"{key}.{short[key]}" if key in short else key
    settings = [one.name for one in dataclasses.fields(SamplingConfig)]
    if head in settings:
        return f"sampling.{key}"
    possible = [*sections, *settings]
    inside = [f"{name}.{one.name}" for name, kind in KINDS.items() for one in dataclasses.fields(kind)]
    raise UserError(f"unknown setting {key!r}{suggest(head, [*possible, *inside])} Possible: {', '.join(possible)}")


def sample(run: SampleRun, version: int | None = None) -> int:
    """Sample what is missing in the file of a run; returns how many prompts it then holds.

    Args:
        run: the settings.
        version: stands in the file, and a vLLM server is given the weights of the run's model first; None: it has them.

    Raises:
        UserError: a setting, the data, the model or the engine; or a file of another run. What was sampled stays in the file.
    """
    held = resume(run)
    tokenizer = load_tokenizer(run.model)
    loaded = data.load(run.data, tokenizer, roles=(), source=True)
    prompts, done = loaded.train["prompt"][:], len(held)
    if held != prompts[:done]:
        raise UserError(
            f"output: {run.output} holds prompts that the data no longer has there; choose another file, or delete it"
        )
    rows = {
        "model": run.model.name,
        "data": str(loaded.report),
        "engine": run.engine.kind + (f" at {run.engine.url}" if run.engine.url else ""),
        "prompts": f"{len(prompts)}, of which {done} are done; {run.n} completions of each",
        "output": run.output,
    }
    if warning := truncation_warning(run.sampling):
        rows["warning"] = warning
    console.show(rows, title="posttrain sample")
    if done < len(prompts):
        folder = Path(run.output).absolute().parent / ".weights" if version is not None and run.engine.url else None
        engine = build(run.engine, run.sampling, run.model, tokenizer, model=lambda: _model(run), folder=folder)
        try:
            if version is not None and (folder is not None or run.engine.kind == "hf"):
                engine.sync(version)
            asked = [json.loads(text)["prompt"] if text else None for text in loaded.train["source"]]
            console.track(_fill(run, engine, tokenizer, prompts, asked, done), len(prompts), "sampling")
        finally:
            engine.close()
    console.show({"prompts": str(len(prompts)), "output": run.output}, title="sampled")
    return len(prompts)


def resume(run: SampleRun) -> list[list[int]]:
    """The prompts that the file of a run holds whole; a last line that was cut off is removed, a new file gets its settings.

    Raises:
        UserError: the file is another run's, or damaged elsewhere than at its end.
    """
    path, beside = Path(run.output), Path(f"{run.output}.json")
    ours = run.identity()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(ours, indent=2) + "\n", encoding="utf-8")
        path.touch()
        return []
    if not beside.is_file():
        raise UserError(
            f"output: {path} is there and {beside} is not, so posttrain sample did not write it; choose another file"
        )
    theirs = json.loads(beside.read_text(encoding="utf-8"))
    if other := first_difference(theirs, ours, ""):
        raise UserError(f"output: {path} is another run's: {other.lstrip('.')}; choose another file, or delete it")
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    prompts = []
    for number, line in enumerate(whole.splitlines()):
        try:
            row = json.loads(line)
            assert row["row"] == number
            prompts.append(row["prompt_ids"])
        except (ValueError, KeyError, TypeError, AssertionError):
            again = "delete it and all that follow, and they are sampled again"
            raise UserError(f"output: {path}: line {number + 1} is damaged; {again}") from None
    if whole != content:
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return prompts


def _fill(
    run: SampleRun,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    asked: Sequence[Text | None],
    done: int,
) -> Iterator[int]:
    """Sample and write the rows from `done` on, some at a time; yields the rows that are written."""
    together = max(1, (run.engine.batch_size or 32) // run.n) if run.engine.kind == "hf" else 256
    with Path(run.output).open("a", encoding="utf-8") as file:
        for start in range(done - done % together, len(prompts), together):  # the group that was cut short is sampled whole
            part = range(start, min(start + together, len(prompts)))
            seeds = [derived(run.sampling.seed, row) for row in part]
            rollouts = engine.generate([prompts[row] for row in part], run.n, seeds=seeds)
            for row in part:
                if row >= done:
                    group = rollouts[(row - start) * run.n : (row - start + 1) * run.n]
                    line = {**_line(row, group, tokenizer), "asked": asked[row]}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            yield part[-1] + 1


def _line(row: int, group: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    known = group[0].logps is not None
    return {
        "row": row,
        "prompt": tokenizer.decode(group[0].prompt),
        "completions": [text_of(one, tokenizer) for one in group],
        "prompt_ids": group[0].prompt,
        "completion_ids": [one.completion for one in group],
        "logps": [[round(value, 6) for value in one.logps] for one in group] if known else None,
        "finished": [one.finished for one in group],
        "version": group[0].version,
    }


def _model(run: SampleRun) -> nn.Module:
    """The model, where the accelerator is, in the dtype that it computes best in."""
    model = load_model(run.model, low_precision=True).to(PartialState().device)
    return model.eval().requires_grad_(False)
