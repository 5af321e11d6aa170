"""Opening a data set: hub id, JSON, JSON lines, Parquet or CSV file, or folder, whole or as a stream."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from datasets.exceptions import DatasetGenerationError

from .schema import UserError, suggest

BUILDERS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
"""File name ending -> reader of `datasets`."""


def open_source(
    name: str, *, subset: str | None = None, split: str | None = None, streaming: bool = False, where: str = "data"
) -> tuple[Dataset | IterableDataset, str]:
    """The rows of one split of a data set, and the split's name.

    Args:
        name: hub id, path of a file (`BUILDERS`; compressed ones too), or folder of such files or of `save_to_disk`.
        subset: configuration of a hub data set.
        split: by default `train`, or the only one; `train[:10%]` works where the set is not streamed.
        streaming: read as needed instead of downloading first.
        where: how errors call the data set.

    Raises:
        UserError: there is no such file, data set, subset or split, it cannot be read or reached, or it has no rows.
    """
    path = Path(name).expanduser()
    local = path.exists() or name.startswith((".", "/", "~")) or _ending(path) in BUILDERS
    if local and not path.exists():
        beside = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
        raise UserError(f"{where}: no such file or folder{suggest(path.name, beside)}")
    if local and subset is not None:
        raise UserError(f"{where}: subset {subset!r} is for data sets of the hub; a local one has none")
    sliced = split is not None and not streaming and any(mark in split for mark in "[+")
    with readable(where):
        found = _read(path, name, local, subset, split if sliced else None, streaming, where)
    if isinstance(found, (DatasetDict, IterableDatasetDict)):
        split = split or ("train" if "train" in found else next(iter(found)) if len(found) == 1 else None)
        if split not in found:
            got = "several splits, none of them train" if split is None else f"no split {split!r}{suggest(split, [*found])}"
            raise UserError(f"{where}: {got.rstrip('.')}; splits: {', '.join(found)}; name one with split")
        found = found[split]
    return found, split or "train"


@contextlib.contextmanager
def readable(where: str) -> Iterator[None]:
    """Turn what a damaged or unreachable file makes of reading it into one line; streams are read while they are used.

    Raises:
        UserError: it cannot be read.
    """
    try:
        yield
    except StopIteration:
        raise UserError(f"{where}: the data set is empty") from None
    except (OSError, EOFError, ValueError, DatasetGenerationError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where}: {_reason(error)}") from None


def _read(path: Path, name: str, local: bool, subset: str | None, split: str | None, streaming: bool, where: str):
    if not local:
        return datasets.load_dataset(name, subset, split=split, streaming=streaming)
    if path.is_dir():
        if any((path / mark).exists() for mark in ("dataset_dict.json", "state.json")):
            if streaming or split is not None:
                raise UserError(f"{where}: a folder of save_to_disk can be neither streamed nor sliced")
            return datasets.load_from_disk(str(path))
        return datasets.load_dataset(str(path), split=split, streaming=streaming)
    if _ending(path) not in BUILDERS:
        raise UserError(f"{where}: files of this kind are not read; possible: {', '.join(BUILDERS)}")
    if path.stat().st_size == 0:
        raise UserError(f"{where}: the file is empty")
    more = {"sep": "\t"} if _ending(path) == ".tsv" else {}
    return datasets.load_dataset(BUILDERS[_ending(path)], data_files=str(path), split=split, streaming=streaming, **more)


def _ending(path: Path) -> str:
    """The last suffix that does not name a compression."""
    return next((suffix for suffix in reversed(path.suffixes) if suffix not in (".gz", ".zst", ".bz2", ".xz")), "")


def _reason(error: Exception) -> str:
    """The first line of the innermost cause, and for an unreachable hub what to do."""
    if isinstance(error, ConnectionError):
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "") else ""
        return f"not on this machine and the hub cannot be reached{offline}; give the path of a local file or folder"
    while isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]
