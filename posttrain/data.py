"""Data: any preference data set as tokenised rows, with a report of everything that was done to it.

A row is `{"prompt": ids, "<role>": [ids, ...], "<column>": number}`: for each role a list of completions, every one with its
end token. Rows are detected (layouts.py), rendered and cut (encoding.py) once, through `datasets.map`, which caches them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .schema import UserError
from .settings import DataConfig, Source

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

    from .mismatch import Mismatched, MismatchedStream
    from .tally import Report


PAIRED = ("chosen", "rejected")
"""Roles of the rows that `data.unpair` takes apart."""

UNPAIRED = (("completion",), ("label",))
"""Roles and columns of the rows that it makes of them."""


@dataclass(frozen=True)
class Loaded:
    """What a run trains and evaluates on."""

    train: Dataset | IterableDataset | Mismatched | MismatchedStream
    """Rows to train on: `prompt`, the roles, the columns; nothing else."""

    eval: Dataset | IterableDataset | Mismatched | MismatchedStream | None
    """Rows to evaluate on, alike."""

    report: Report
    """What was read, kept, cut and left out."""


def load(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    roles: Sequence[str],
    columns: Sequence[str] | Mapping[str, float | None] = (),
    where: str = "data",
    *,
    ended: bool = True,
    source: bool = False,
) -> Loaded:
    """Read, tokenise and count the rows of a run.

    Of several processes, let the first call it before the others: they read what it cached.

    Args:
        config: the settings.
        tokenizer: with the chat template to use.
        roles: completions of a row: `("chosen", "rejected")`, `("completion",)`, or none for prompts alone.
        columns: per-row numbers to carry along, such as `("label",)`; or name -> what it is where the data have no such column.
        where: the section of the recipe, for errors.
        ended: completions end with an end token, as a policy has to learn it; otherwise texts are read as they stand.
        source: carry each row along as it was stored, too: `source`, JSON of its `prompt` (text or messages) and its `row`.

    Raises:
        UserError: settings that exclude each other, data that cannot be read or do not fit, or no row left.
    """
    from . import rows

    _refuse(config, where)
    if config.unpair and (tuple(roles), tuple(columns)) != UNPAIRED:
        raise UserError(f"{where}: unpair = true makes rows of completion and label; this method reads {', '.join(roles)}")
    sources = config.mixture or (Source(name=config.name, subset=config.subset, split=config.split),)
    sources = [replace(one, limit=one.limit or config.limit) for one in sources]
    asked = None if config.eval is None else replace(config.eval, name=config.eval.name or config.name)
    columns = dict(columns) if isinstance(columns, Mapping) else dict.fromkeys(columns)
    of_rows = (PAIRED, {}) if config.unpair else (tuple(roles), columns)
    train, evaluation, report = rows.load(config, sources, asked, tokenizer, *of_rows, where, ended=ended, stored=source)
    if config.unpair:
        train, evaluation = rows.unpaired(train), None if evaluation is None else rows.unpaired(evaluation)
        report = replace(report, train_rows=report.train_rows and 2 * report.train_rows, eval_rows=2 * report.eval_rows)
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
