"""A setting that is another objective with settings of its own: `loss: {name: ipo, beta: 0.2}`, `--loss.name ipo`."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import core_schema

from .registry import Objective, all_objectives, find
from .schema import UserError, parse, suggest


@dataclass(frozen=True, eq=False)
class Nested:
    """In `Annotated[dict[str, Any], Nested(...)]`: the setting is the name of an objective and settings of it.

    What is not given is as in `default` where the name is the default's, else the objective's own default.
    """

    what: str
    """What kind of objective it has to be, for the refusal of others: `a loss of ...`."""

    admits: Callable[[Objective], bool]
    """Whether an objective is one of those."""

    default: Mapping[str, Any]
    """Name of the default, and those of its settings that differ from its own defaults."""

    def find(self, value: Mapping[str, Any], where: str = "loss") -> tuple[Objective, Any]:
        """The objective that a value names, and its settings.

        Raises:
            UserError: no mapping, a name that is not admitted, or a wrong setting; begins with `where`.
        """
        if not isinstance(value, Mapping):
            raise UserError(f"{where} = {value!r}: a mapping is expected; --{where}.name {value} makes one")
        default = self.default if value.get("name", self.default["name"]) == self.default["name"] else {}
        settings = {**default, **value}
        objective = self._admitted(settings.pop("name"), where)
        return objective, parse(objective.config, settings, where)

    def complete(self, value: Mapping[str, Any], where: str = "loss") -> dict[str, Any]:
        """The value with all settings.

        Raises:
            UserError: as `find`.
        """
        objective, config = self.find(value, where)
        return {"name": objective.name, **dataclasses.asdict(config)}

    def possible(self) -> list[str]:
        """The names that are admitted."""
        return [one.name for one in all_objectives() if self.admits(one)]

    def _admitted(self, name: Any, where: str) -> Objective:
        try:
            objective = find(str(name))
        except UserError:
            objective = None
        if objective is None or not self.admits(objective):
            names = self.possible()
            raise UserError(
                f"{where}: name = {name!r} is not {self.what}{suggest(str(name), names)} Possible: {', '.join(names)}"
            )
        return objective

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.with_info_plain_validator_function(lambda value, info: self.complete(value, info.field_name))

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"type": "object", "properties": {"name": {"enum": self.possible()}}}


def nested_settings(kind: type) -> dict[str, Nested]:
    """The settings of a dataclass that are objectives."""
    hints = typing.get_type_hints(kind, include_extras=True)
    found = {name: [one for one in typing.get_args(hint)[1:] if isinstance(one, Nested)] for name, hint in hints.items()}
    return {name: ones[0] for name, ones in found.items() if ones}
