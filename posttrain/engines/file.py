"""Rollouts from a file: completions sampled before, by `posttrain sample` or by anything else.

A file has one JSON object a line, about one prompt. Either token ids, in `prompt_ids` and `completion_ids` (one list each, of
no ids where a stop string came first), with `logps`, `finished` and `version` where they are known; or text, in `prompt` (text
or messages) and `completions`, which goes through chat template and tokenizer as training data does. Several lines about one
prompt add up.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..conversations import kind_of
from ..encoding import encoder, end_tokens
from ..layouts import detect
from ..schema import UserError
from ..tally import KEPT
from .rollout import Rollout
from .stop import Stop

_ANY_LENGTH = 2**31 - 1


class FileEngine:
    """Gives what a file holds, in its order; seeds and versions that are asked for change nothing.

    Args:
        path: the file.
        tokenizer: with the chat template, for text.
        stop: strings that completions are cut before.

    Raises:
        UserError: there is no such file, or a line that is not of its form.
    """

    def __init__(self, path: str | Path, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.stop = Stop(stop, tokenizer)
        self.where = f"engine file {path}"
        self._groups: dict[tuple[int, ...], list[Rollout]] = {}
        lines = list(_lines(Path(path), self.where))
        texts = [(number, line) for number, line in lines if "prompt_ids" not in line]
        encoded = iter(_encoded(texts, tokenizer, self.where))
        for number, line in lines:
            found = _of_ids(line, f"{self.where}: line {number}") if "prompt_ids" in line else next(encoded)
            self._groups.setdefault(tuple(found[0].prompt), []).extend(found)

    def generate(self, prompts: Sequence[Sequence[int]], n: int = 1, *, seeds: Sequence[int] | None = None) -> list[Rollout]:
        """The first n completions that the file holds of each prompt.

        Raises:
            UserError: it holds fewer.
        """
        del seeds
        out = []
        for group, prompt in enumerate(prompts):
            held = self._groups.get(tuple(prompt), [])
            if len(held) < n:
                raise UserError(
                    f"{self.where}: {len(held)} completions of prompt {group + 1} of {len(prompts)}, {n} are asked for; it "
                    f"holds {len(self._groups)} prompts, and a prompt is found by its token ids (same template and settings)"
                )
            out += [self.stop.cut(replace(one, group=group)) for one in held[:n]]
        return out

    def sync(self, version: int) -> None:
        """Nothing: what was sampled was sampled."""

    def close(self) -> None:
        """Nothing."""


def _lines(path: Path, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and content of each line that is not empty."""
    if not path.is_file():
        raise UserError(f"{where}: no such file")
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
            except ValueError as error:
                raise UserError(f"{where}: line {number} is not JSON: {error}") from None
            if not isinstance(line, dict) or not ({"prompt_ids", "completion_ids"} <= line.keys() or "completions" in line):
                keys = ", ".join(line) if isinstance(line, dict) else kind_of(line)
                expected = "prompt_ids and completion_ids, or prompt and completions"
                raise UserError(f"{where}: line {number} has {keys or 'nothing'}; expected {expected}")
            yield number, line


def _of_ids(line: dict[str, Any], where: str) -> list[Rollout]:
    prompt, completions = line["prompt_ids"], line["completion_ids"]
    n = len(completions) if isinstance(completions, list) else 0
    if not _ids(prompt) or not prompt or not n or not all(_ids(one) for one in completions):
        raise UserError(f"{where}: prompt_ids has to be a list of token ids, and completion_ids a list of such lists")
    more = {"logps": [None] * n, "finished": [True] * n} | {key: line[key] for key in ("logps", "finished") if line.get(key)}
    for name, values in more.items():
        if len(values) != n:
            raise UserError(f"{where}: {name} has {len(values)} entries for {n} completions")
    for ids, logps in zip(completions, more["logps"], strict=True):
        if logps is not None and len(logps) != len(ids):
            raise UserError(f"{where}: {len(logps)} logps for a completion of {len(ids)} tokens")
    values = zip(completions, more["logps"], more["finished"], strict=True)
    return [Rollout(prompt, ids, logps, finished, 0, line.get("version", 0)) for ids, logps, finished in values]


def _ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)


def _encoded(
    lines: Sequence[tuple[int, dict[str, Any]]], tokenizer: PreTrainedTokenizerBase, where: str
) -> Iterator[list[Rollout]]:
    """The rollouts of each line of text; each completion gets its end token."""
    for number, line in lines:
        texts = line["completions"]
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{where}: line {number}: completions has to be a list of texts, not empty")
        if "prompt" not in line:
            raise UserError(f"{where}: line {number} has completions and no prompt")
    if not lines:
        return
    rows = [{"prompt": line["prompt"], "completion": text} for _, line in lines for text in line["completions"]]
    markers = list(end_tokens(tokenizer).values())
    layout = detect(rows[:64], ("completion",), template=bool(tokenizer.chat_template), markers=markers, where=where)
    got = encoder(tokenizer, layout, max_length=_ANY_LENGTH)(
        {name: [row[name] for row in rows] for name in ("prompt", "completion")}, range(len(rows))
    )
    at = 0
    for number, line in lines:
        part = range(at, at := at + len(line["completions"]))
        unusable = [got["outcome"][i] for i in part if got["outcome"][i] != KEPT]
        if unusable:
            raise UserError(f"{where}: line {number}: {unusable[0]}")
        yield [Rollout(got["prompt"][i], got["completion"][i][0], None, True, 0, 0) for i in part]
