"""Rows: data sets opened, tokenised through `datasets`, counted, mixed and split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets, interleave_datasets

from .encoding import Encoder, encoder, end_tokens
from .layouts import detect
from .schema import UserError
from .sources import open_source, readable
from .tally import KEPT, LENGTHS, MARKS, Report, Tally

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .data import DataConfig, Source

_SAMPLE = 64
"""Rows from which a layout is detected and a stream is judged."""

_STOP = {
    "too_long": ("too long", "completion too long"),
    "identical": ("identical",),
    "empty": ("empty completion", "empty prompt"),
}
"""Setting -> outcomes that it turns into errors."""


@dataclass(frozen=True)
class Opened:
    """A data set that can be read and whose layout is known."""

    raw: Dataset | IterableDataset
    """As it was stored."""

    encoder: Encoder
    """How its rows become token ids."""

    features: Features
    """Of the encoded rows."""

    tally: Tally
    """Empty."""

    stop: Mapping[str, str]
    """Outcome -> setting that makes it an error."""

    where: str
    """How errors call it."""

    sample: list[dict[str, Any]]
    """Its first rows."""

    @property
    def row(self) -> list[str]:
        """The columns of a finished row."""
        return [name for name in self.features if name not in ("outcome", *MARKS, *LENGTHS)]

    def illustrate(self, row: Mapping[str, Any]) -> None:
        """Keep a row as the example, as text."""
        decode, layout = self.encoder.tokenizer.decode, self.encoder.layout
        self.tally.example = {"prompt": decode(row["prompt"]), **{role: decode(row[role][0]) for role in layout.roles}}


def load(
    config: DataConfig,
    sources: Sequence[Source],
    asked: Source | None,
    tokenizer: PreTrainedTokenizerBase,
    roles: tuple[str, ...],
    columns: Mapping[str, float | None],
    where: str,
    *,
    ended: bool = True,
    stored: bool = False,
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None, Report]:
    """Rows to train on, rows to evaluate on, and the report; see `data.load`."""
    more = {"ended": ended, "stored": stored}
    parts = [_open(config, one, tokenizer, roles, columns, where, **more) for one in sources]
    other = None if asked is None else _open(config, asked, tokenizer, roles, columns, f"{where}.eval", **more)
    if other and other.tally.name in [part.tally.name for part in parts]:
        raise UserError(f"{where}.eval: {other.tally.name} is trained on; give another split, or use eval_size")
    weights = [one.weight for one in sources]
    if config.streaming:
        return _streams(config, parts, weights, other)
    return _tables(config, parts, weights, other, where)


def _open(
    config: DataConfig,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    roles: tuple[str, ...],
    columns: Mapping[str, float | None],
    where: str,
    *,
    ended: bool,
    stored: bool,
) -> Opened:
    where = f"{where} {source.name}"
    raw, split = open_source(source.name, subset=source.subset, split=source.split, streaming=config.streaming, where=where)
    if source.limit is not None:
        raw = raw.take(source.limit)
    with readable(where):
        sample = list(raw.take(_SAMPLE))
    if not sample:
        raise UserError(f"{where}: the data set is empty")
    layout = detect(
        sample,
        roles,
        numbers=columns,
        columns=config.columns if source.columns is None else source.columns,
        form=config.format,
        template=bool(tokenizer.chat_template),
        markers=list(end_tokens(tokenizer).values()),
        system=config.system,
        where=where,
    )
    encode = encoder(
        tokenizer,
        layout,
        max_length=config.max_length,
        max_prompt=config.max_prompt,
        truncate=config.too_long == "truncate_prompt",
        keep_identical=config.identical == "keep",
        ended=ended,
        source=stored,
    )
    ids = List(Value("int32"))
    features = Features(
        {"outcome": Value("string"), "prompt": ids}
        | {role: List(ids) for role in roles}
        | dict.fromkeys(MARKS, Value("bool"))
        | dict.fromkeys(LENGTHS, Value("int32"))
        | dict.fromkeys(columns, Value("float32"))
        | ({"source": Value("string")} if stored else {})
    )
    name = "/".join(part for part in (source.name, source.subset) if part) + f" ({split})"
    tally = Tally(name, str(layout), layout.mapping, config.max_length, config.max_prompt, config.streaming)
    stop = {"too_long": config.too_long, "identical": config.identical, "empty": config.empty}
    stop = {outcome: setting for setting, policy in stop.items() if policy == "error" for outcome in _STOP[setting]}
    return Opened(raw, encode, features, tally, stop, where, sample)


def _tokenise(part: Opened, num_proc: int | None) -> tuple[Dataset, dict[str, np.ndarray]]:
    """All rows of a data set encoded, those left out too, and what is known about each."""
    encoded = part.raw.map(
        part.encoder,
        batched=True,
        with_indices=True,
        remove_columns=part.raw.column_names,
        features=part.features,
        num_proc=num_proc,
        desc=f"Tokenising {part.tally.name}",
    )
    about = encoded.select_columns(["outcome", *MARKS, *LENGTHS]).with_format("numpy")[:]
    return encoded, about


def _count(part: Opened, encoded: Dataset, about: Mapping[str, np.ndarray], used: np.ndarray) -> None:
    """Fill the tally from the rows used, and refuse what has to be refused."""
    about = {name: values[used] for name, values in about.items()}
    part.tally.add(about)
    part.tally.measure(about)
    part.tally.require(part.stop, part.where, about, used + 1)
    part.tally.require_some(part.where)
    part.illustrate(encoded[int(used[np.argmax(about["outcome"] == KEPT)])])


def _tables(
    config: DataConfig, parts: list[Opened], weights: Sequence[float], other: Opened | None, where: str
) -> tuple[Dataset, Dataset | None, Report]:
    tables, abouts = zip(*(_tokenise(part, config.num_proc) for part in parts), strict=True)
    sizes = [len(table) for table in tables]
    starts = np.cumsum([0, *sizes])
    order = np.random.default_rng(config.seed).permutation(starts[-1])
    usable = []
    for part, table, about, start, weight in zip(parts, tables, abouts, starts, weights, strict=False):
        mine = order[(order >= start) & (order < start + len(table))]
        mine = mine[: max(1, round(min(weight, 1) * len(mine)))]
        _count(part, table, about, np.sort(mine) - start)
        usable.append(mine[about["outcome"][mine - start] == KEPT])
    pool = order[np.isin(order, np.concatenate(usable))]
    held, rest = pool[: config.eval_size], pool[config.eval_size :]
    if not len(rest):
        raise UserError(f"{where}: eval_size = {config.eval_size} leaves nothing to train on; {len(pool)} rows are usable")
    chosen = [np.sort(_repeat(rest[np.isin(rest, mine)], weight)) for mine, weight in zip(usable, weights, strict=True)]
    everything = concatenate_datasets(list(tables)).select_columns(parts[0].row)
    train = everything.select(np.concatenate(chosen))
    evaluation = everything.select(np.sort(held)) if config.eval_size else None
    if other is not None:
        table, about = _tokenise(other, config.num_proc)
        _count(other, table, about, np.arange(len(table)))
        evaluation = table.select_columns(other.row).select(np.flatnonzero(about["outcome"] == KEPT))
    tallies = [part.tally for part in parts]
    report = Report(tallies, other and other.tally, len(train), 0 if evaluation is None else len(evaluation))
    return train, evaluation, report


def unpaired(rows: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Of every pair two rows: the chosen completion with label 1, then the rejected one with label 0."""
    ids = List(Value("int32"))
    features = Features({"prompt": ids, "completion": List(ids), "label": Value("float32")})
    return rows.map(_apart, batched=True, remove_columns=["chosen", "rejected"], features=features)


def _apart(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    sides = zip(batch["prompt"], batch["chosen"], batch["rejected"], strict=True)
    made = [(prompt, side, label) for prompt, *both in sides for side, label in zip(both, (1.0, 0.0), strict=True)]
    return dict(zip(("prompt", "completion", "label"), map(list, zip(*made, strict=True)), strict=True))


def _repeat(rows: np.ndarray, weight: float) -> np.ndarray:
    """Rows, each as often as a weight above 1 says; the fractional part adds the first of them once more."""
    whole, part = divmod(max(weight, 1), 1)
    return np.concatenate([np.tile(rows, int(whole)), rows[: round(part * len(rows))]])


def _streams(
    config: DataConfig, parts: list[Opened], weights: Sequence[float], other: Opened | None
) -> tuple[IterableDataset, IterableDataset | None, Report]:
    report = Report([part.tally for part in parts], other and other.tally, None, config.eval_size)
    streams = [_stream(part, report.live) for part in parts]
    evaluation = None if other is None else _stream(other, [])
    train = streams[0]
    if len(streams) > 1:
        shares = (np.array(weights) / sum(weights)).tolist()
        train = interleave_datasets(streams, shares, seed=config.seed, stopping_strategy="all_exhausted")
    if config.eval_size:
        evaluation, train = train.take(config.eval_size), train.skip(config.eval_size)
    buffer = 1000 if config.shuffle_buffer is None else config.shuffle_buffer
    return train.shuffle(seed=config.seed, buffer_size=buffer) if buffer else train, evaluation, report


def _stream(part: Opened, live: list[Tally]) -> IterableDataset:
    """The rows of a stream that are kept; its first rows fill the tally, a second one in `live` counts while it is read."""
    sample = {name: [row[name] for row in part.sample] for name in part.sample[0]}
    about = part.encoder(sample, range(len(part.sample)))
    part.tally.add(about)
    part.tally.measure(about)
    part.tally.require(part.stop, part.where, about, range(1, len(part.sample) + 1))
    part.tally.require_some(part.where)
    first = about["outcome"].index(KEPT)
    part.illustrate({name: about[name][first] for name in part.row})
    live.append(replace(part.tally, outcomes=Counter(), marks=Counter(), long_prompts=0, streaming=False))
    return part.raw.map(
        _Kept(part, live[-1]),
        batched=True,
        batch_size=_SAMPLE,
        with_indices=True,
        remove_columns=list(part.sample[0]),
        features=Features({name: part.features[name] for name in part.row}),
    )


@dataclass(frozen=True)
class _Kept:
    """Encodes a batch of a stream, counts it, and returns the rows that are kept."""

    part: Opened
    live: Tally

    def __deepcopy__(self, memo: dict[int, Any]) -> _Kept:
        """Itself: `datasets` copies streams to shuffle or mix them, and the counts have to stay the caller's."""
        return self

    def __call__(self, batch: Mapping[str, list[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        got = self.part.encoder(batch, indices)
        self.live.add(got)
        self.live.require(self.part.stop, self.part.where, got, [index + 1 for index in indices])
        kept = [at for at, outcome in enumerate(got["outcome"]) if outcome == KEPT]
        return {name: [got[name][at] for at in kept] for name in self.part.row}
