"""Where the files that come with the toolkit are: recipes and launch configurations."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from .schema import UserError, suggest


def folder(name: str) -> Path:
    """`recipes` or `accelerate_configs`: of the repository this package stands in, else of the installation."""
    beside = Path(__file__).parent.parent / name
    return beside if beside.is_dir() else Path(sysconfig.get_path("data")) / "share" / "posttrain" / name


def launch_config(name: str) -> Path:
    """The accelerate configuration that `--launch` names: one that comes with the toolkit, or a file.

    Raises:
        UserError: neither; lists those that exist.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml", ".json"):
        if not path.is_file():
            raise UserError(f"--launch: file {name} does not exist")
        return path
    known = {entry.stem: entry for entry in sorted(folder("accelerate_configs").glob("*.yaml"))}
    if name not in known:
        raise UserError(
            f"--launch: {name!r} does not exist{suggest(name, list(known))} Possible: {', '.join(known)}, or a file"
        )
    return known[name]
