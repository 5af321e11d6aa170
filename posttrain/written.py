"""What a user writes, a YAML file of sections and `key=value` over it, as one mapping of plain values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from .schema import UserError, suggest


def read(path: str | Path | None, sections: Sequence[str], short: Mapping[str, str]) -> dict[str, Any]:
    """The sections of a YAML file; none of it for no file.

    Args:
        path: the file, or None.
        sections: the keys that it may have.
        short: sections that may be one word -> the key that the word is for.

    Raises:
        UserError: there is no such file, it is no mapping in YAML, or has another key.
    """
    if path is None:
        return {}
    if not Path(path).is_file():
        raise UserError(f"recipe {path} does not exist")
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping with the keys {', '.join(sections)}")
    for key in values:
        if key not in sections:
            raise UserError(f"{path}: unknown key {key!r}{suggest(str(key), list(sections))} Possible: {', '.join(sections)}")
    return {key: _spelled_out(key, value, short) for key, value in values.items() if value is not None}


def split(override: str) -> tuple[str, str]:
    """`key=value` -> (key, value).

    Raises:
        UserError: it is not of that form.
    """
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r} is neither a recipe file nor key=value")
    return key, value


NAMED = {"reward": ("name", "heldout"), "preference": ("name",), "engine": ("kind",)}
"""Sections whose settings belong to what one of them names: that one, and those that do not belong to it."""


def merge(written: Mapping[str, Any], changes: Mapping[str, str]) -> dict[str, Any]:
    """Sections with dotted keys changed; the values of the changes are YAML. Another name in a section of `NAMED` takes the
    place of the written one and its settings.

    Raises:
        UserError: a value that is not YAML, or a key inside something that is no mapping.
    """
    merged = OmegaConf.create(dict(written) | {name: _kept(name, written, changes) for name in NAMED if name in written})
    for key, value in changes.items():
        try:
            merged.merge_with_dotlist([f"{key}={value}"])
        except (OmegaConfBaseException, YAMLError, AttributeError, TypeError, ValueError) as error:
            raise UserError(f"{key} = {value!r}: {' '.join(str(error).split())}") from None
    try:
        return OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(" ".join(str(error).split())) from None


def _kept(name: str, written: Mapping[str, Any], changes: Mapping[str, str]) -> Any:
    """What stays of a written section of `NAMED`."""
    values, (key, *others) = written[name], NAMED[name]
    replaced = isinstance(values, dict) and key in values and changes.get(f"{name}.{key}", values[key]) != values[key]
    return {key: value for key, value in values.items() if key in others} if replaced else values


def section(values: Mapping[str, Any], name: str, where: Callable[[str], str], short: Mapping[str, str]) -> dict[str, Any]:
    """A section as a mapping, empty where it is absent.

    Raises:
        UserError: it is something else.
    """
    found = _spelled_out(name, values.get(name) if values.get(name) is not None else {}, short)
    if not isinstance(found, dict):
        raise UserError(f"{where(name)} = {found!r}: a mapping is expected")
    return found


def whence(path: str | Path | None, written: Mapping[str, Any], changes: Mapping[str, str]) -> Callable[[str], str]:
    """How errors call a section: with the file's name before it where all of it is the file's."""

    def where(name: str) -> str:
        from_file = path is not None and not any(key.split(".")[0] == name for key in changes)
        return f"{path}: {name}" if from_file and name in written else name

    return where


def _spelled_out(name: str, value: Any, short: Mapping[str, str]) -> Any:
    return {short[name]: value} if name in short and not isinstance(value, dict) else value
