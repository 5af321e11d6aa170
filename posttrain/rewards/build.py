"""From the settings of a reward to the scorer: `{name: length, target: 50}`, and to a preference."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Mapping
from typing import Any

from ..schema import UserError, parse, suggest
from ..settings import RewardConfig
from .calibration import Calibrated
from .judges import PairPreference, RewardModel
from .rules import Answer, Format, Length, Regex, Vader
from .scorer import Preference, Reward, Scorer, bradley_terry

SCORERS: dict[str, type] = {
    "length": Length,
    "regex": Regex,
    "format": Format,
    "answer": Answer,
    "vader": Vader,
    "model": RewardModel,
    "calibrated": Calibrated,
}
"""Name of a scorer -> its settings, which are called as it is (but for `calibrated`, which is another's). Any other is
`module:function`."""


def scorer(values: Mapping[str, Any] | str, where: str = "reward") -> Scorer:
    """The scorer that settings describe.

    Args:
        values: `name`, a key of SCORERS or `module:function`, and the settings of that scorer (for a function: keyword
            arguments, verbatim); or the name alone.
        where: how errors call the section.

    Raises:
        UserError: there is no such scorer, or a setting is wrong.
    """
    name, settings = _named(values, where)
    if ":" in name:
        return Scorer(name, functools.partial(_imported(name, where), **settings))
    if name not in SCORERS:
        possible = [*SCORERS, "module:function"]
        raise UserError(f"{where}.name = {name!r}{suggest(name, possible)} Possible: {', '.join(possible)}")
    found = parse(SCORERS[name], settings, where)
    if isinstance(found, Calibrated):
        return Scorer(name, functools.partial(found.score, scorer(found.of, f"{where}.of")))
    return Scorer(name, found)


def reward(config: RewardConfig, where: str = "reward") -> Reward:
    """The reward that settings describe: scorers with weights, and one that is only logged. Two of one name are told apart by
    their number: `length`, `length 2`.

    Raises:
        UserError: as `scorer`; or a weight that is no finite number.
    """
    parts: list[tuple[Scorer, float]] = []
    for number, values in enumerate(config.scorers):
        place = where if len(config.scorers) == 1 else f"{where}[{number}]"
        weight = values.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise UserError(f"{place}.weight = {weight!r}: a finite number is expected")
        one = scorer({key: value for key, value in values.items() if key != "weight"}, place)
        before = sum(other.name.split(" ")[0] == one.name for other, _ in parts)
        parts.append((one if not before else Scorer(f"{one.name} {before + 1}", one.score), float(weight)))
    heldout = None if config.heldout is None else scorer(config.heldout, f"{where}.heldout")
    return Reward(tuple(parts), heldout)


def preference(values: Mapping[str, Any] | str, where: str = "preference") -> Preference:
    """The preference that settings describe: `pairs` is a model that compares, `module:function` a function of Python that
    gives the probability for one order, and a scorer's settings make the Bradley-Terry preference of its scores.

    Raises:
        UserError: as `scorer`.
    """
    name, settings = _named(values, where)
    if name == "pairs":
        return Preference(name, parse(PairPreference, settings, where))
    if ":" in name:
        return Preference(name, functools.partial(_imported(name, where), **settings))
    return bradley_terry(scorer(values, where))


def _named(values: Mapping[str, Any] | str, where: str) -> tuple[str, dict[str, Any]]:
    settings = {"name": values} if isinstance(values, str) else dict(values)
    name = settings.pop("name", None)
    if not isinstance(name, str):
        raise UserError(f"{where}.name is required; possible: {', '.join([*SCORERS, 'module:function'])}")
    return name, settings


def _imported(path: str, where: str) -> Any:
    module, _, name = path.partition(":")
    try:
        found = vars(importlib.import_module(module))
    except ImportError as error:
        raise UserError(f"{where}.name: {module} cannot be imported: {error}") from None
    if not callable(found.get(name)):
        possible = [key for key, value in found.items() if callable(value) and not key.startswith("_")]
        raise UserError(f"{where}.name: {module} has no function {name!r}{suggest(name, possible)}")
    return found[name]
