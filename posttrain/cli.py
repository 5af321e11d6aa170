"""The command line: `posttrain <objective> [recipe] [--setting value]`, `train`, `iterate`, `check`, `logps`, `sample`, `show`.

Flags are the keys of a recipe and go through the parser of recipes (recipe.py); help is read from the declarations. So
nothing is declared here, and an objective that is added gets its command by existing.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from . import __version__, registry
from .schema import UserError

_PLACES = """\
RECIPE is a YAML file; flags are its keys (--beta is objective.beta, --model is model.name, --train.learning_rate ...) and win
over it. `key=value` without dashes means the same."""


class Posttrain(click.Group):
    """The verbs, and one command per objective found in the package; mistakes of the user are one line and status 2."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*registry.names(), *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        verb = super().get_command(ctx, cmd_name)
        return verb if verb or cmd_name not in registry.names() else _objective_command(cmd_name)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            from .schema import suggest

            possible = self.list_commands(ctx)
            raise UserError(f"command {args[0]!r} does not exist{suggest(args[0], possible)} Possible: {', '.join(possible)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from .docs import summaries

        with formatter.section("Objectives"):
            formatter.write_dl(list(summaries().items()))
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.commands[name].get_short_help_str(90)) for name in sorted(self.commands)])

    def main(self, args: Sequence[str] | None = None, standalone_mode: bool = True, **extra: Any) -> Any:
        try:
            status = super().main(args, standalone_mode=False, **extra)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            status = 2
        except click.ClickException as error:
            status = _fail(error.format_message())
        except UserError as error:
            status = _fail(str(error))
        except click.Abort:
            click.echo("posttrain: interrupted", err=True)
            status = 130
        sys.exit(status if isinstance(status, int) else 0)


class RunCommand(click.Command):
    """A command that takes a run: a recipe, flags and `key=value`. Its help lists the settings by section."""

    objective: str | None = None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        if self.objective is None:
            return
        _lazy_torch()
        from . import docs

        objective = registry.find(self.objective)
        for title, rows in docs.sections(objective).items():
            with formatter.section(f"Settings: {title}"):
                formatter.write_dl([(f"{row.flag}  {row.type}", f"{row.description}  [{row.default}]") for row in rows])
        with formatter.section("Settings: run"):
            formatter.write_dl(
                [
                    ("--layout  auto|tree|separate", "Share prompts among completions; auto: where it is exact.  [auto]"),
                    (
                        "--nonfinite  stop|skip|go_on",
                        "A loss or gradient that is not finite: end the run with the batch saved, leave the step out,"
                        " or take it.  [stop]",
                    ),
                    ("--imports  list of modules", "Python modules to import first; they may register objectives.  [[]]"),
                ]
            )
        with formatter.section("Settings: train (any argument of transformers.TrainingArguments; our defaults)"):
            formatter.write_dl([(row.flag, f"{row.default}: {row.description}") for row in docs.train_defaults()])

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.objective is None:
            return super().format_help_text(ctx, formatter)
        _lazy_torch()
        formatter.write_paragraph()
        for line in registry.find(self.objective).document.split("\n"):
            formatter.write(f"  {line}\n" if line else "\n")
        formatter.write_paragraph()
        formatter.write_text(_PLACES.replace("\n", " "))


class ListedCommand(click.Command):
    """`posttrain sample`, `eval` and `iterate`: their help lists the settings by section."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        from . import docs

        sections = docs.iteration_sections() if self.name == "iterate" else docs.sampling_sections(self.name)
        for title, rows in sections.items():
            with formatter.section(f"Settings: {title}"):
                formatter.write_dl([(f"{row.flag}  {row.type}", f"{row.description}  [{row.default}]") for row in rows])


_TAKES_A_RUN = {"ignore_unknown_options": True, "max_content_width": 110}


def _run_arguments(function: Any) -> Any:
    """The arguments that every command on a run has."""
    processes = click.option("--processes", type=click.IntRange(1), help="Processes to launch; default: one per GPU here.")
    launch = click.option(
        "--launch",
        metavar="NAME",
        help="Run under `accelerate launch`: single, ddp, fsdp2, zero2, zero3, or a configuration file.",
    )
    words = click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[RECIPE] [--KEY VALUE | KEY=VALUE]...")
    return launch(processes(words(function)))


def _objective_command(name: str) -> click.Command:
    @click.command(name, cls=RunCommand, context_settings=_TAKES_A_RUN)
    @_run_arguments
    def command(words: tuple[str, ...], launch: str | None, processes: int | None) -> None:
        _train(name, words, launch, processes)

    command.objective = name
    return command


@click.command(cls=Posttrain, context_settings={"max_content_width": 110}, epilog="posttrain <command> --help says more.")
@click.version_option(__version__)
def main() -> None:
    """Alignment and distillation of Hugging Face causal language models.

    posttrain dpo --model Qwen/Qwen3-0.6B --data trl-lib/ultrafeedback_binarized --divergence js
    """


@main.command(cls=RunCommand, context_settings=_TAKES_A_RUN)
@_run_arguments
def train(words: tuple[str, ...], launch: str | None, processes: int | None) -> None:
    """Train what a recipe says; `posttrain train recipe.yaml objective.beta=0.2`."""
    _train("train", words, launch, processes)


@main.command(cls=RunCommand, context_settings=_TAKES_A_RUN)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[RECIPE] [--KEY VALUE | KEY=VALUE]...")
def check(words: tuple[str, ...]) -> None:
    """Resolve a run and show data, lengths, reference and predicted memory; loads no weights, trains nothing."""
    recipe, overrides = read_words(words)
    if _iterates(recipe):
        from .iterate import check as plan
        from .iterations import load_iterate_run

        return plan(load_iterate_run(recipe, overrides))
    run = _load("check", words, None, None)
    from .check import check as report

    report(run)


@main.command(cls=ListedCommand, context_settings=_TAKES_A_RUN)
@_run_arguments
def iterate(words: tuple[str, ...], launch: str | None, processes: int | None) -> None:
    """Train in iterations, each on the policy's own responses: sample, judge, select, train; goes on where it was interrupted.

    posttrain iterate recipe.yaml --iterations.count 3 --reward vader

    Beside these, everything that the command of the recipe's objective takes. --launch starts the processes of each training.
    """
    recipe, overrides = read_words(words)
    from .iterations import load_iterate_run

    run = load_iterate_run(recipe, overrides)
    if launch is not None:
        from .shipped import launch_config

        launch_config(launch)
    elif processes is not None:
        raise UserError("--processes belongs to --launch")
    from .iterate import iterate as begin

    with _stoppable():
        begin(run, _launching(launch, processes))


@main.command(cls=RunCommand, context_settings=_TAKES_A_RUN)
@_run_arguments
def logps(words: tuple[str, ...], launch: str | None, processes: int | None) -> None:
    """Compute the reference's log-probs of a run and keep them; runs with reference.kind=cached read them.

    For a distillation, ask its teacher for the likeliest items; runs with teacher.kind=cached or served read them.
    """
    run = _load("logps", words, launch, processes)
    from .leave import leave
    from .precompute import precompute

    precompute(run)
    leave()


@main.command(cls=ListedCommand, context_settings=_TAKES_A_RUN)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[RECIPE] [--KEY VALUE | KEY=VALUE]...")
def sample(words: tuple[str, ...]) -> None:
    """Sample completions of the prompts of a data set into JSON lines.

    posttrain sample --model FOLDER --data prompts.jsonl --n 4 --max_new_tokens 64 --output samples.jsonl
    """
    recipe, overrides = read_words(words)
    from .faults import writing
    from .run import quiet_libraries
    from .sample import load_sample_run
    from .sample import sample as fill

    quiet_libraries()
    run = load_sample_run(recipe, overrides)
    with writing(Path(run.output), "output"):
        fill(run)


@main.command("eval", cls=ListedCommand, context_settings=_TAKES_A_RUN)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[RECIPE] [--KEY VALUE | KEY=VALUE]...")
def evaluate(words: tuple[str, ...]) -> None:
    """Sample a model and measure reward, KL to a reference, win rate, entropy, length and repetition.

    posttrain eval --model FOLDER --reference BASE --data prompts.jsonl --reward vader --n 4 --output runs/eval
    """
    recipe, overrides = read_words(words)
    from .evaluate import evaluate as measure
    from .evaluate import load_eval_run
    from .faults import writing
    from .run import quiet_libraries

    quiet_libraries()
    run = load_eval_run(recipe, overrides)
    with writing(Path(run.output), "output"):
        measure(run)


@main.command()
@click.argument("folders", nargs=-1, required=True, metavar="FOLDER...")
@click.option("--output", default="frontier.png", show_default=True, help="The file to write.")
@click.option("--x", help="Metric on the horizontal axis; default: the KL that all have.")
@click.option("--y", default="reward", show_default=True, help="Metric on the vertical axis.")
@click.option("--smooth", type=click.IntRange(min=1), help="Logs that a point of a line is the mean of.  [a tenth of all]")
def plot(folders: tuple[str, ...], output: str, x: str | None, y: str, smooth: int | None) -> None:
    """Draw reward against KL of training runs and evaluations, by their folders; needs the extra `plots`."""
    from .plots import plot as draw

    drawn = draw(folders, output, x, y, smooth)
    click.echo(f"{output}: " + ", ".join(f"{folder} ({count})" for folder, count in drawn.items()))


@main.command()
@click.argument("name", required=False)
@click.option("--table", metavar="FILE", type=Path, help="Bring the table of methods in a file up to date (README.md).")
def show(name: str | None, table: Path | None) -> None:
    """List the objectives, or show one: equation, source, settings, recipes. `show train`: the trainer's arguments."""
    if name != "train":
        _lazy_torch()
    if table is not None:
        if name is not None:
            raise UserError(f"show: --table is of all methods, not of {name!r}")
        from . import methods

        return methods.write(table)
    from . import docs

    click.echo(docs.show(name) if name else docs.show_list())


def _train(command: str, words: Sequence[str], launch: str | None, processes: int | None) -> None:
    run = _load(command, words, launch, processes)
    from .run import execute

    with _stoppable():
        execute(run)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Ends with 143 where a run was told to stop; of several processes all go together."""
    from .leave import leave
    from .run import Stopped

    try:
        yield
    except Stopped as stopped:
        click.echo(f"posttrain: {stopped}", err=True)
        leave(128 + signal.SIGTERM)
        sys.exit(128 + signal.SIGTERM)
    leave()


def _launching(launch: str | None, processes: int | None) -> list[str]:
    """The words that say in which processes a run is trained."""
    if launch is None:
        return []
    return ["--launch", launch, *([] if processes is None else ["--processes", str(processes)])]


def _iterates(recipe: str | None) -> bool:
    """Whether a recipe is one of `posttrain iterate`."""
    from .recipe import ITERATED, SECTIONS, SHORT
    from .written import read

    return "iterations" in read(recipe, (*SECTIONS, *ITERATED), SHORT)


def _load(command: str, words: Sequence[str], launch: str | None, processes: int | None) -> Any:
    """The run that the words of a command describe; `--launch` reads it for its mistakes, then accelerate starts it anew."""
    from .recipe import load_run

    recipe, overrides = read_words(words)
    run = load_run(command if command in registry.names() else None, recipe, overrides)
    if launch is not None:
        from .launch import launch as start
        from .shipped import launch_config

        sys.stdout.flush()
        start(launch_config(launch), [command, *words], processes)
    if processes is not None:
        raise UserError("--processes belongs to --launch")
    return run


def read_words(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The words of a command as a recipe (or None) and `key=value` overrides.

    `--key value`, `--key=value`, `key=value` are one thing; `--key` before another flag or at the end is `key=true`.

    Raises:
        UserError: a word that is none of these, or a second recipe.
    """
    recipe, overrides, rest = None, [], list(words)
    while rest:
        word = rest.pop(0)
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            if not equals:
                value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
            overrides.append(f"{key.replace('-', '_')}={value}")
        elif "=" in word and not Path(word).is_file():
            overrides.append(word)
        elif recipe is None and not word.startswith("-"):
            recipe = word
        else:
            raise UserError(f"{word!r} is neither --key value nor key=value" + (f"; the recipe is {recipe}" if recipe else ""))
    return recipe, overrides


def _fail(message: str) -> int:
    """One line on standard error, from one process of a launch; returns the exit status."""
    if os.environ.get("RANK", "0") == "0":
        click.echo(f"posttrain: error: {' '.join(message.split())}", err=True)
    return 2


class _TorchLater(types.ModuleType):
    """torch, imported at the first attribute that is read. importlib's LazyLoader would import it at `import torch`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        del sys.modules["torch"]
        self.__dict__.update(vars(importlib.import_module("torch")))
        return self.__dict__[name]


def _lazy_torch() -> None:
    """Help reads declarations, and these touch no attribute of torch: its two seconds of import are left out."""
    if "torch" not in sys.modules:
        sys.modules["torch"] = _TorchLater("torch")
