"""Types of settings, and the strict reading of mappings into them.

A setting is declared once: an annotated field of a dataclass with a docstring under it. Help, JSON schema, validation and
documentation are read from that declaration.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, TypeAdapter, ValidationError

T = TypeVar("T")

Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Probability = Annotated[float, Ge(0), Le(1)]
OpenUnit = Annotated[float, Gt(0), Lt(1)]
PositiveInt = Annotated[int, Gt(0)]
NonNegativeInt = Annotated[int, Ge(0)]

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
"""What every settings dataclass is read with: unknown keys and numbers that are not finite are refused, the docstring under a
field is its description."""


class UserError(ValueError):
    """A mistake in the user's input: one line that says where, what was got and what is possible. Exit status 2."""


def suggest(got: str, possible: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: `; did you mean x?`, else a full stop.

    Up to three names are suggested that have it for their initials or among their words, of a name with dots in its last part
    (`output` in `train.output_dir`); else the one that is spelled most like it.
    """
    names = list(possible)

    def likeness(name: str) -> float:
        return difflib.SequenceMatcher(None, name, got).ratio()

    def relation(name: str) -> float:
        last = name.rpartition(".")[2]
        if "_" in last and got == "".join(word[:1] for word in last.split("_")):
            return 1.0
        return likeness(last) if f"_{got}_" in f"_{last}_" else 0.0

    found = sorted(filter(relation, names), key=relation, reverse=True)[:3]
    if not found:
        found = [name for name in names if likeness(name) == max(0.6, *map(likeness, names))][:1]
    return f"; did you mean {' or '.join(found)}?" if found else "."


@functools.cache
def adapter(kind: type[T]) -> TypeAdapter[T]:
    """The strict reader of a settings dataclass."""
    if dataclasses.is_dataclass(kind):
        kind.__pydantic_config__ = STRICT  # type: ignore[attr-defined]
    return TypeAdapter(kind)


def parse(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """Read a mapping into the settings dataclass `kind`.

    Raises:
        UserError: an unknown key, a missing key or a wrong value, named with `where` and its path, in one line.
    """
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            raise UserError(f"{where}: unknown key {key!r}{suggest(str(key), names)} Possible: {', '.join(names)}")
    try:
        return adapter(kind).validate_python(dict(values))
    except ValidationError as error:
        raise UserError("; ".join(_line(where, one) for one in error.errors())) from None


def _line(where: str, error: Any) -> str:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"{where}: {path} is required"
    cause = error.get("ctx", {}).get("error")
    if path and isinstance(cause, UserError):  # of settings within a setting, which says where itself
        return f"{where}.{cause}"
    message = error["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list, as in [a, b]")
    return f"{where}: {path} = {error['input']!r}: {message}" if path else f"{where}: {message}"


def fields(kind: type) -> list[dict[str, Any]]:
    """Each setting of a dataclass as `name`, `type`, `default` (absent when required), `description`, for help and docs."""
    schema = adapter(kind).json_schema()
    required = set(schema.get("required", ()))
    hints = {field.name: field.type for field in dataclasses.fields(kind)}
    rows = []
    for name, entry in schema.get("properties", {}).items():
        row = {"name": name, "type": str(hints[name]), "description": entry.get("description", "")}
        if name not in required:
            row["default"] = entry.get("default")
        rows.append(row)
    return rows
