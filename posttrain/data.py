"""Data: any preference data set as tokenised rows, with a report of everything that was done to it.

A row is `{"prompt": ids, "<role>": [ids, ...], "<column>": number}`: for each role a list of completions, every one with its
end token. Rows are detected (layouts.py), rendered and cut (encoding.py) once, through `datasets.map`, which caches them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge
from pydantic import BeforeValidator

from .schema import STRICT, NonNegativeInt, Positive, PositiveInt, UserError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

    from .tally import Report


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data set of a mixture, or the one to evaluate on."""

    __pydantic_config__ = STRICT

    name: str | None = None
    """Hub id, file or folder; for `eval`, the training set's when absent."""

    subset: str | None = None
    """Configuration of a hub data set."""

    split: str | None = None
    """Split to read; `train`, or the only one, when absent."""

    columns: Mapping[str, str] | None = None
    """What a column is for -> its name, where detection is wrong; the training set's `columns` when absent."""

    limit: PositiveInt | None = None
    """Read only the first rows."""

    weight: Positive = 1.0
    """In a mixture, how often each row is used in an epoch: 0.25 takes a random quarter, 2 takes every row twice. Of streams,
    whose size is unknown, the relative rate at which rows are drawn."""


EvalSource = Annotated[Source, BeforeValidator(lambda got: {"name": got} if isinstance(got, str) else got)]
"""A data set, or just its name."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Settings of the data."""

    name: str | None = None
    """Hub id, local .json, .jsonl, .parquet, .csv or .tsv file, or folder."""

    mixture: tuple[Source, ...] = ()
    """Several data sets instead of `name`: a list of {name, weight, subset, split, columns, limit}."""

    subset: str | None = None
    """Configuration of a hub data set."""

    split: str | None = None
    """Split to train on; `train`, or the only one, when absent. Slices such as `train[:10%]` work."""

    eval: EvalSource | None = None
    """Separate rows to evaluate on: a name, or {name, subset, split, columns, limit}."""

    eval_size: NonNegativeInt = 0
    """Rows to hold out for evaluation instead: drawn with `seed`, of a stream the first ones."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """What a column is for -> its name, where detection is wrong, such as {prompt: question}."""

    format: Literal["auto", "chat", "plain"] = "auto"
    """`chat` renders text through the tokenizer's chat template (a prompt is one user turn, an HH transcript is its turns),
    `plain` takes it as it stands, `auto` is chat wherever there is a template and the text is not rendered already."""

    system: str | None = None
    """System prompt for rows that have none."""

    max_length: Annotated[int, Ge(2)] = 1024
    """Tokens of the prompt and any one completion together."""

    max_prompt: PositiveInt | None = None
    """Tokens of the prompt; no limit of its own when absent."""

    too_long: Literal["drop", "truncate_prompt", "error"] = "drop"
    """Longer rows: leave out, cut the prompt from the left (its leading special tokens and completions stay whole), or stop."""

    identical: Literal["drop", "keep", "error"] = "drop"
    """Pairs of equal completions: they have no gradient in a preference loss and only blur its metrics."""

    empty: Literal["drop", "error"] = "drop"
    """Rows with an empty completion or prompt: leave out, or stop."""

    limit: PositiveInt | None = None
    """Read only the first rows of each training set."""

    streaming: bool = False
    """Read rows as they are needed, without download or cache; training then needs train.max_steps."""

    shuffle_buffer: NonNegativeInt | None = None
    """Streaming only: rows to shuffle among, 1000 when absent; 0 keeps their order. (Otherwise the trainer shuffles.)"""

    seed: NonNegativeInt = 0
    """Of held-out rows, mixture and stream. The order within an epoch is the trainer's (train.seed)."""

    num_proc: PositiveInt | None = None
    """Processes that tokenise; one when absent."""


@dataclass(frozen=True)
class Loaded:
    """What a run trains and evaluates on."""

    train: Dataset | IterableDataset
    """Rows to train on: `prompt`, the roles, the columns; nothing else."""

    eval: Dataset | IterableDataset | None
    """Rows to evaluate on, alike."""

    report: Report
    """What was read, kept, cut and left out."""


def load(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    roles: Sequence[str],
    columns: Sequence[str] = (),
    where: str = "data",
) -> Loaded:
    """Read, tokenise and count the rows of a run.

    Of several processes, let the first call it before the others: they read what it cached.

    Args:
        config: the settings.
        tokenizer: with the chat template to use.
        roles: completions of a row: `("chosen", "rejected")`, `("completion",)`, or none for prompts alone.
        columns: per-row numbers to carry along, such as `("label",)`.
        where: the section of the recipe, for errors.

    Raises:
        UserError: settings that exclude each other, data that cannot be read or do not fit, or no row left.
    """
    from . import rows

    _refuse(config, where)
    sources = config.mixture or (Source(name=config.name, subset=config.subset, split=config.split),)
    sources = [replace(one, limit=one.limit or config.limit) for one in sources]
    asked = None if config.eval is None else replace(config.eval, name=config.eval.name or config.name)
    train, evaluation, report = rows.load(config, sources, asked, tokenizer, tuple(roles), tuple(columns), where)
    return Loaded(train, evaluation, report)


def _refuse(config: DataConfig, where: str) -> None:
    """Refuse settings that exclude each other or would be ignored."""
    asked = config.eval
    for wrong, message in (
        (config.name is None and not config.mixture, "name is required: a hub id, file or folder"),
        (config.name and config.mixture, "name and mixture exclude each other"),
        (config.mixture and (config.subset or config.split), "subset and split of a mixture are given with each of its sets"),
        (any(one.name is None for one in config.mixture), "every set of the mixture needs a name"),
        (asked and config.eval_size, "eval and eval_size exclude each other"),
        (asked and asked.weight != 1, "eval takes no weight"),
        (asked and not (asked.name or config.name), "eval needs a name beside a mixture"),
        (config.shuffle_buffer is not None and not config.streaming, "shuffle_buffer is for streaming: true"),
        (config.num_proc and config.streaming, "num_proc has no effect with streaming: true"),
        ((config.max_prompt or 0) >= config.max_length, "max_prompt has to be smaller than max_length"),
    ):
        if wrong:
            raise UserError(f"{where}: {message}")
