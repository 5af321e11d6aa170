"""A teacher on disk: of every completion token the k items that it finds likeliest, what it leaves to the rest, and the token.

The cache is addressed by content: a folder per teacher (weights, dtype, tokens in common with the student, k, temperature), and
in it one entry per (prompt, completion) token sequence. Whatever does not change what the teacher says (learning rate, loss,
order of rows, output folder) does not change an address, so a sweep asks a teacher once.

Entries lie end to end in shards, safetensors files of some 64 MB, S entries of N tokens in all:

    keys [S, 16] uint8, lengths [S] int64, sums [S] uint32     address, tokens and CRC-32 of each entry: the shard's index
    ids [N, k] uint16 (int32 beyond 65,536 items)              the items, likeliest first
    logps [N, k] float32                                       their log-probs, which are the teacher's to the bit
    tail [N] float32                                           log of the probability of all other items together
    own [N] float32                                            the log-prob of the token itself

That is 6 k + 8 bytes a token, 8 k + 8 for a large vocabulary: 520 at k = 64. A shard is read through a memory map; when it is
opened only its index comes into memory, later the entries that a batch asks for, each of which is checked against its sum. The
folder has no further index that could disagree with its shards.

Log-probs in float16 would save a quarter to a third of that and change kd's gradient by 8e-4 (relative norm, k = 8, over
SmolLM2-135M's distributions), 10,000 times what float32 does; rounding of a teacher's logits by 0.02 changes it by 5e-2.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import nn
from transformers import PreTrainedModel

from .models import causal_lm
from .reference import sequence_key
from .replacing import replacing
from .schema import UserError

_VERSION, _MARK = "1", "posttrain teacher"
"""Under the mark a shard's metadata has the version and the digest of its index: one key, since safetensors orders several at
random and equal answers are to give equal files."""

_SHARD_BYTES = 64 * 2**20
"""A few minutes of work; a crash loses at most the unfinished shard."""

FLOOR = -9999.0
"""Log-prob of what a teacher finds impossible, as vLLM reports it: exp of it is 0, and 0 times it is no NaN."""

_INDEX = ("keys", "lengths", "sums")
_VALUES = ("ids", "logps", "tail", "own")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What a teacher says of the T tokens of a completion."""

    ids: np.ndarray
    """[T, k] the items it finds likeliest, likeliest first."""

    logps: np.ndarray
    """[T, k] their log-probs."""

    own: np.ndarray
    """[T] the log-prob of the token itself."""


class CachedTeacher:
    """What a teacher said of completions, on disk. The collator looks it up (`lookup`), so no teacher is held while training.

    Args:
        folder: of this teacher with this k.
        k: items of a token.
        size: tokens that student and teacher have in common.
        name: of the teacher, for people.

    Raises:
        UserError: a shard is damaged, or was written by another version.
    """

    models: tuple[nn.Module, ...] = ()

    def __init__(self, folder: Path, *, k: int, size: int, name: str) -> None:
        self.folder, self.k, self.size, self.name = folder, k, size, name
        self.description = f"cached {k} likeliest items of {name} ({folder})"
        self.shard_tokens = max(_SHARD_BYTES // (k * (self._id_type().itemsize + 4) + 8), 1)
        self._shards: dict[Path, Any] = {}
        self._places: dict[bytes, tuple[Path, int, int, int]] = {}
        self.reload()

    def __len__(self) -> int:
        return len(self._places)

    def __reduce__(self) -> tuple[Any, ...]:
        """Memory maps do not travel to worker processes that are not forked; those open their own."""
        return _reopened, (self.folder, self.k, self.size, self.name)

    def body(self, model: nn.Module) -> PreTrainedModel:
        """The student, for want of another model."""
        return causal_lm(model)

    def prepare(self, accelerator: Any) -> None:
        """Nothing: what the teacher says comes with the batch."""

    def reload(self) -> None:
        """Open the shards that are not open yet.

        Raises:
            UserError: one is damaged, or was written by another version.
        """
        for path in sorted(set(self.folder.glob("*.safetensors")) - self._shards.keys()):
            self._shards[path], index = _open(path)
            ends = index["lengths"].cumsum()
            starts = ends - index["lengths"]
            columns = (index["keys"], starts.tolist(), ends.tolist(), index["sums"].tolist())
            for key, start, end, total in zip(*columns, strict=True):
                self._places[key.tobytes()] = (path, start, end, total)

    def verify(self) -> None:
        """Read every entry once.

        Raises:
            UserError: one is damaged.
        """
        for place in self._places.values():
            self._read(*place)

    def tail(self) -> float:
        """The probability that the teacher leaves to all other items, on average over tokens."""
        tails = [shard.get_tensor("tail") for shard in self._shards.values()]
        return float(np.exp(np.concatenate(tails)).mean(dtype=np.float64))

    def lookup(self, prompt: Sequence[int], completion: Sequence[int]) -> dict[str, np.ndarray]:
        """What the teacher says of a completion of T tokens: `reference_logps` [T], `top_ids` [T, k] int64 and
        `top_reference_logps` [T, k].

        Raises:
            UserError: it was never asked (the data changed since), or the entry is damaged.
        """
        if not completion:
            none = {"reference_logps": (0,), "top_ids": (0, self.k), "top_reference_logps": (0, self.k)}
            return {name: np.empty(shape, dtype=np.int64 if name == "top_ids" else np.float32) for name, shape in none.items()}
        place = self._places.get(sequence_key(prompt, completion))
        if place is None:
            raise UserError(
                f"teacher: {self.folder} lacks a completion of {len(completion)} tokens; `posttrain logps` with this recipe "
                "adds what is missing"
            )
        found = self._read(*place)
        return {
            "reference_logps": found["own"],
            "top_ids": found["ids"].astype(np.int64),
            "top_reference_logps": found["logps"],
        }

    def missing(self, rows: Iterable[dict[str, Any]], roles: Sequence[str]) -> list[dict[str, Any]]:
        """The rows with at least one completion that is not in the cache."""

        def absent(row: dict[str, Any]) -> bool:
            return any(sequence_key(row["prompt"], c) not in self._places for role in roles for c in row[role])

        return [row for row in rows if absent(row)]

    def keep(self, answers: Iterable[Sequence[tuple[bytes, Entry]]]) -> Iterator[int]:
        """Write (key, entry) as they come, shard by shard; yields how many came so far.

        A shard is written beside and renamed, so a killed process loses the unfinished one only; where an answer fails, what
        came before it is written, too.
        """
        shard: dict[bytes, Entry] = {}
        tokens = done = 0
        try:
            for answer in answers:
                shard |= answer
                done += len(answer)
                tokens += sum(len(entry.own) for _, entry in answer)
                if tokens >= self.shard_tokens:
                    self._write(shard)
                    shard, tokens = {}, 0
                yield done
        finally:
            if shard:
                self._write(shard)

    def _id_type(self) -> np.dtype:
        return np.dtype(np.uint16 if self.size <= 2**16 else np.int32)

    def _write(self, entries: dict[bytes, Entry]) -> None:
        values = [self._stored(entry) for entry in entries.values()]
        tensors = {name: np.concatenate([one[name] for one in values]) for name in _VALUES} | {
            "keys": np.frombuffer(b"".join(entries), dtype=np.uint8).reshape(-1, 16),
            "lengths": np.array([len(one["own"]) for one in values], dtype=np.int64),
            "sums": np.array([_sum(one) for one in values], dtype=np.uint32),
        }
        name = hashlib.blake2b(tensors["keys"].tobytes(), digest_size=12).hexdigest()
        with replacing(self.folder / f"{name}.safetensors") as partial:
            save_file(tensors, partial, metadata={_MARK: f"{_VERSION} {_digest(tensors)}"})

    def _stored(self, entry: Entry) -> dict[str, np.ndarray]:
        assert entry.ids.shape == entry.logps.shape == (len(entry.own), self.k), "an entry of another shape"
        logps = np.maximum(entry.logps, FLOOR).astype(np.float32)
        rest = 1 - np.exp(logps.astype(np.float64)).sum(1)
        tail = np.log(np.maximum(rest, math.exp(-700)))
        return {
            "ids": entry.ids.astype(self._id_type()),
            "logps": logps,
            "tail": np.maximum(tail, FLOOR).astype(np.float32),
            "own": np.maximum(entry.own, FLOOR).astype(np.float32),
        }

    def _read(self, path: Path, start: int, end: int, total: int) -> dict[str, np.ndarray]:
        found = {name: self._shards[path].get_slice(name)[start:end] for name in _VALUES}
        if _sum(found) != total:
            raise _damaged(path, f"checksum of tokens {start} to {end}")
        return found


def _open(path: Path) -> tuple[Any, dict[str, np.ndarray]]:
    """A shard under its memory map, and its index."""
    try:
        shard = safe_open(path, framework="numpy")
        version, _, digest = (shard.metadata() or {}).get(_MARK, "none").partition(" ")
        index = {name: shard.get_tensor(name) for name in _INDEX} if version == _VERSION else {}
    except (SafetensorError, OSError) as error:
        raise _damaged(path, str(error)) from None
    if not index:
        raise UserError(f"teacher: {path} has version {version}, this program reads {_VERSION}; delete it")
    if _digest(index) != digest:
        raise _damaged(path, "checksum of its index")
    return shard, index


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"teacher: {path} is damaged ({why}); delete it, and `posttrain logps` asks for its part again")


def _digest(tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in _INDEX:
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()


def _sum(values: dict[str, np.ndarray]) -> int:
    total = 0
    for name in _VALUES:
        total = zlib.crc32(np.ascontiguousarray(values[name]), total)
    return total


def _reopened(folder: Path, k: int, size: int, name: str) -> CachedTeacher:
    return CachedTeacher(folder, k=k, size=size, name=name)
