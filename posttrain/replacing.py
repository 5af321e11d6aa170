"""Files that are there whole or not at all: written beside their place under another name, then renamed."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file, whose folder is made: a hidden name next to its own, which it takes once it is on the disk.

    Where writing fails (a full disk, an interruption) what was written is removed, and a file that was at `path` is as it was.
    A process that is killed leaves `.<name>.<digits>.partial`, which nobody reads; names differ, so that writers of one file
    are not in each other's way, and the last one counts.

    Raises:
        OSError: the disk takes no more, or the folder cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        with partial.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
