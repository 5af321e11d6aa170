"""The registry of objectives. One decorator learns from a function and its annotations all that the toolkit needs to know."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .schema import UserError, suggest

if TYPE_CHECKING:
    from .experience import Experience, Lesson
    from .stats import Learned, Want

OBJECTIVES: dict[str, Objective] = {}


@dataclass(frozen=True)
class Objective:
    """One method: a pure function `(config, statistics) -> Loss` and what it declares."""

    name: str
    """The function's name; also the command and the `name:` of a recipe."""

    function: Callable[..., Any]
    """`(config, statistics) -> Loss`; pure: it does not reduce over rows, communicate, log or know a model."""

    config: type
    """Frozen dataclass of its settings (the annotation of the first argument)."""

    family: type
    """The statistics it reads (the annotation of the second argument): `Pairs`, ..."""

    reads_reference: Callable[[Any], bool]
    """From the config, whether it reads the reference."""

    want: Callable[[Any], Sequence[Want]]
    """From the config, the per-token statistics it needs beyond log-probs."""

    start: Callable[[Any], float | None]
    """From the config, the loss where the policy equals the reference; None where it depends on the data."""

    before: Callable[[Any, Any], Mapping[str, Any]] | None
    """`(config, statistics) -> values by name`: evaluated without gradient on every micro-batch of an optimizer step before any
    loss; their global means are in the context. A role annotated `Completions | None` is there only then."""

    before_reads: Sequence[str]
    """Roles that `before` reads beside those that are there only for it; where there are neither, it reads all."""

    state: Callable[[Any, Mapping[str, float], Mapping[str, float]], Mapping[str, float]] | None
    """`(config, context, means) -> numbers by name`: what it carries from step to step, in the context and in every checkpoint.
    Called with nothing in both before the first step, then after each with the context as it would be in the next, but for the
    state, which is still that of this step, and the global means over this step of what the loss asked to `remember`."""

    advise: Callable[[Any, Mapping[str, Sequence[float]]], Sequence[str]] | None
    """`(config, columns of the training set) -> warnings`: what in the data speaks against the settings, one line each."""

    learned: Learned | None
    """Parameters of its own and what they say of each token."""

    watch: Callable[[Any, Mapping[str, float]], Sequence[str]] | None
    """`(config, metrics of a log) -> warnings`: what in them says that the training goes wrong and what to change, one line
    each; each line is shown once."""

    any_tokenizer: bool
    """Whether its teacher may have a tokenizer of its own."""

    coupled: bool
    """Whether rows of one micro-batch affect each other's loss, so that it depends on how a batch is split."""

    lesson: Callable[[Any, Experience], Lesson] | None
    """`(config, experience) -> lesson`: what is learned from a round of rollouts. An objective with one is online: its data are
    prompts, its completions are sampled."""

    document: str
    """The docstring of its module: equation, source, start value."""

    def __call__(self, config: Any, statistics: Any) -> Any:
        return self.function(config, statistics)

    @property
    def online(self) -> bool:
        """Whether its data are prompts and its completions are sampled while it trains."""
        return self.lesson is not None

    @property
    def reads_teacher(self) -> bool:
        """Whether the reference it reads is a teacher: another model than the policy at its start, given as `teacher:`."""
        from .stats import Taught

        return issubclass(self.family, Taught)

    @property
    def scores(self) -> bool:
        """Whether what it trains scores completions: a sequence classification model with one output, no language model."""
        from .scores import Scored

        return issubclass(self.family, Scored)


def objective(
    *,
    reference: bool | Callable[[Any], bool],
    want: Sequence[Want] | Callable[[Any], Sequence[Want]] = (),
    start: float | Callable[[Any], float | None] | None = None,
    before: Callable[[Any, Any], Mapping[str, Any]] | None = None,
    before_reads: Sequence[str] = (),
    state: Callable[[Any, Mapping[str, float], Mapping[str, float]], Mapping[str, float]] | None = None,
    advise: Callable[[Any, Mapping[str, Sequence[float]]], Sequence[str]] | None = None,
    learned: Learned | None = None,
    watch: Callable[[Any, Mapping[str, float]], Sequence[str]] | None = None,
    any_tokenizer: bool = False,
    coupled: bool = False,
    lesson: Callable[[Any, Experience], Lesson] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function `(config: SomeConfig, statistics: Family) -> Loss` as the objective of its name.

    Args:
        reference: whether it reads the reference, or a function from the config to that.
        want: per-token statistics beyond log-probs, or a function from the config to them.
        start: the loss where the policy equals the reference, if that is a number, or a function from the config to it.
        before: values whose global mean over the optimizer step the loss reads from the context.
        before_reads: roles that `before` reads beside the family's early ones.
        state: numbers carried from step to step, given the context and the means of the step.
        advise: warnings from the settings and the columns of the training set; of a stream, which has no end, not asked.
        learned: parameters of its own.
        watch: warnings from the settings and the metrics of a log.
        any_tokenizer: its teacher may have a tokenizer of its own.
        coupled: rows of a micro-batch affect each other's loss.
        lesson: what is learned from a round of rollouts, if it is an online objective.

    Raises:
        UserError: the name is taken.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__
        if name in OBJECTIVES and OBJECTIVES[name].function.__module__ != function.__module__:
            raise UserError(
                f"objective {name!r} in {function.__module__} is already registered by {OBJECTIVES[name].function.__module__}"
            )
        hints = typing.get_type_hints(function)
        config, family = (hints[parameter] for parameter in list(inspect.signature(function).parameters)[:2])
        OBJECTIVES[name] = Objective(
            name=name,
            function=function,
            config=config,
            family=family,
            reads_reference=reference if callable(reference) else lambda _config: reference,
            want=want if callable(want) else lambda _config: want,
            start=start if callable(start) else lambda _config: start,
            before=before,
            before_reads=before_reads,
            state=state,
            advise=advise,
            learned=learned,
            watch=watch,
            any_tokenizer=any_tokenizer,
            coupled=coupled,
            lesson=lesson,
            document=inspect.cleandoc(sys.modules[function.__module__].__doc__ or ""),
        )
        return function

    return register


def names() -> dict[str, str]:
    """The objectives of the package, name -> module, found by looking at the files (nothing is imported)."""
    package = Path(__file__).parent / "objectives"
    found = {}
    for family in sorted(path for path in package.iterdir() if (path / "__init__.py").exists()):
        for module in pkgutil.iter_modules([str(family)]):
            found[module.name] = f"posttrain.objectives.{family.name}.{module.name}"
    return found


def find(name: str) -> Objective:
    """The objective called `name`; imports only its own file.

    Raises:
        UserError: there is none of that name; lists those that exist.
    """
    modules = names()
    if name not in OBJECTIVES and name in modules:
        importlib.import_module(modules[name])
    if name not in OBJECTIVES:
        possible = sorted({*modules, *OBJECTIVES})
        raise UserError(f"objective {name!r} does not exist{suggest(name, possible)} Possible: {', '.join(possible)}")
    return OBJECTIVES[name]


def all_objectives() -> list[Objective]:
    """Every objective of the package and every one registered by an `imports:` module, by name."""
    for name in names():
        find(name)
    return [OBJECTIVES[name] for name in sorted(OBJECTIVES)]
