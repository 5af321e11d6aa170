"""From examples to token ids: the chat template applied once, special tokens never doubled, every cut counted.

The prompt is the template's rendering with its generation prompt (or the text as it stands, after the tokenizer's own leading
tokens); a completion is what the rendering of prompt and completion adds to it, through its end-of-turn token (or `eos`).
Where the tokens of the prompt are not a prefix of those of prompt + completion (a merge across the boundary, a template that
opens the answer in another way), the prompt ends at the last token that it shares with all of them, and the row counts in
`boundary`: every sequence keeps the tokens of its natural reading.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import conversations, layouts
from .conversations import Message, Text, Unusable, common
from .layouts import Example, Layout
from .schema import UserError
from .tally import KEPT, LENGTHS, MARKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CODE = (conversations, layouts, sys.modules[__name__])

_LARGEST_SHIFT = 8
"""Tokens by which the boundary may move: a generation prompt that opens a thought is 2 or 3. More is another prompt."""


_LABEL = (layouts.label, "true, false, 1, 0, desirable or undesirable")
_NUMBER = (layouts.number, "a number")
"""What reads a value of a row, None where it cannot, and what it expects."""


@dataclass(frozen=True)
class Encoder:
    """Turns batches of raw rows into token ids; callable by `datasets.map(batched=True, with_indices=True)`."""

    tokenizer: PreTrainedTokenizerBase
    """With its chat template, where the layout needs one."""

    layout: Layout
    """How rows are read."""

    max_length: int
    """Tokens of prompt + completion."""

    max_prompt: int | None
    """Tokens of the prompt."""

    truncate: bool
    """Cut too long prompts from the left rather than leave the row out."""

    keep_identical: bool
    """Keep rows whose completions are all the same."""

    lead: Sequence[int]
    """What the tokenizer puts before plain text (often one BOS)."""

    ends: Mapping[int, str]
    """Tokens that may end a completion, by id: `eos` and the special tokens of templates."""

    special: frozenset[int]
    """All special tokens; a truncated prompt keeps those it begins with."""

    ended: bool
    """A completion ends with an end token, added where it has none; otherwise it stays as it is rendered."""

    code: str
    """Digest of the code: `datasets` keys its cache by a function's name, not by what it does."""

    source: bool = False
    """Carry each row along as it was stored, in `source`: JSON of its prompt (text or messages) and its columns."""

    def __call__(self, batch: Mapping[str, list[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        """Columns of rows -> columns of tokenised rows, one for each, with `outcome`, `MARKS` and lengths before any cut.

        `outcome` is `kept` or the reason for leaving the row out; ids of rows left out are empty.
        """
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        examples, texts, out = [], [], []
        for row, index in zip(rows, indices, strict=True):
            numbers = self._numbers(row, index + 1)
            try:
                if self.layout.kind == "ids":
                    prompt, sides = self.layout.tokens(row, index + 1)
                    stored = {"source": _source(self.tokenizer.decode(prompt), row)} if self.source else {}
                    out.append(numbers | stored | self._fit(prompt, [prompt + side for side in sides]))
                    examples.append(None)
                    continue
                example = self.layout.example(row, index + 1)
                texts += self._render(example, index + 1)
                examples.append(example)
                out.append(numbers | ({"source": _source(example.prompt, row)} if self.source else {}))
            except Unusable as reason:
                examples.append(None)
                out.append({"outcome": str(reason), **numbers})
        ids = iter(self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else [])
        for row, example in zip(out, examples, strict=True):
            if example is not None:
                row |= self._row(next(ids), [next(ids) for _ in self.layout.roles])
        empty = {"prompt": [], **{role: [] for role in self.layout.roles}, **dict.fromkeys(MARKS, False)}
        empty |= dict.fromkeys(LENGTHS, 0) | ({"source": ""} if self.source else {})
        return {name: [row.get(name, nothing) for row in out] for name, nothing in ({"outcome": KEPT} | empty).items()} | {
            name: [row[name] for row in out] for name in self.layout.numbers
        }

    def _render(self, example: Example, number: int) -> list[str]:
        """The text of the prompt, then of prompt + completion for each completion; blanks after an end token are cut."""
        if self.layout.chat:
            prompt = self._template(example.prompt, example, number, add_generation_prompt=True)
            full = [self._template(example.prompt + side, example, number) for side in example.completions]
        else:
            prompt, full = example.prompt, [example.prompt + side for side in example.completions]
        ends = tuple(self.ends.values()) if self.ended else ()
        return [prompt, *(text.rstrip() if text.rstrip().endswith(ends) else text for text in full)]

    def _template(self, messages: list[Message], example: Example, number: int, **more: Any) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(messages, tools=example.tools, tokenize=False, **more)
        except TemplateError as error:
            raise UserError(f"{self.layout.where}: row {number}: the chat template refuses it: {error}") from None

    def _numbers(self, row: Mapping[str, Any], number: int) -> dict[str, float]:
        found = {}
        for name, absent in self.layout.numbers.items():
            column = self.layout.mapping.get(name)
            got = absent if column is None else row[column]
            read, expected = _LABEL if name == "label" else _NUMBER
            if read(got) is None:
                raise UserError(f"{self.layout.where}: row {number}: column {column!r} holds {got!r}, expected {expected}")
            found[name] = read(got)
        return found

    def _row(self, prompt: list[int], full: list[list[int]]) -> dict[str, Any]:
        """Ids of the prompt and of prompt + completion, from text, -> the row; see `_fit`."""
        if not self.layout.chat:
            prompt, *full = (ids if ids[: len(self.lead)] == self.lead else [*self.lead, *ids] for ids in (prompt, *full))
        if self.ended:
            full = [ids if self.ends.keys() & ids[-1:] else [*ids, self.tokenizer.eos_token_id] for ids in full]
        return self._fit(prompt, full)

    def _fit(self, prompt: list[int], full: list[list[int]]) -> dict[str, Any]:
        """The row with these ids for prompt and prompt + completion, cut to length, or why it is left out."""
        at = common([prompt, *full])
        prompt, shift, sides = prompt[:at], len(prompt) - at, [ids[at:] for ids in full]
        longest = max((len(side) for side in sides), default=0)
        row = {
            "boundary": shift > 0,
            "identical": len(sides) > 1 and all(side == sides[0] for side in sides),
            "prompt_tokens": len(prompt),
            "completion_tokens": longest,
            "tokens": len(prompt) + longest,
        }
        room = min(self.max_length - longest, self.max_prompt or self.max_length)
        lead = next((at for at, token in enumerate(prompt) if token not in self.special), len(prompt))
        if not prompt:
            return row | {"outcome": "empty prompt"}
        if not all(sides):
            return row | {"outcome": "empty completion"}
        if shift > _LARGEST_SHIFT:
            return row | {"outcome": "prompt rendered in another way with its answer"}
        if row["identical"] and not self.keep_identical:
            return row | {"outcome": "identical"}
        if len(prompt) > room:
            if not self.truncate or room <= lead:
                return row | {"outcome": "completion too long" if self.truncate else "too long"}
            row["truncated"] = True
            prompt = prompt[:lead] + prompt[lead - room :]
        return row | {"prompt": prompt} | {role: [side] for role, side in zip(self.layout.roles, sides, strict=True)}


def encoder(
    tokenizer: PreTrainedTokenizerBase,
    layout: Layout,
    *,
    max_length: int,
    max_prompt: int | None = None,
    truncate: bool = False,
    keep_identical: bool = False,
    ended: bool = True,
    source: bool = False,
) -> Encoder:
    """The encoder of one data set; see the fields of `Encoder`.

    Raises:
        UserError: the tokenizer has no eos token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(f"{layout.where}: the tokenizer has no eos token, so no completion could end; set one")
    bare, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    return Encoder(
        tokenizer,
        layout,
        max_length,
        max_prompt,
        truncate,
        keep_identical,
        lead=next(full[:at] for at in range(len(full) + 1) if full[at : at + len(bare)] == bare),
        ends=end_tokens(tokenizer),
        special=frozenset(tokenizer.all_special_ids) | end_tokens(tokenizer).keys(),
        ended=ended,
        code=hashlib.sha256(b"".join(Path(module.__file__).read_bytes() for module in _CODE)).hexdigest(),
        source=source,
    )


def _source(prompt: Text, row: Mapping[str, Any]) -> str:
    return json.dumps({"prompt": prompt, "row": row}, ensure_ascii=False, default=str)


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """`eos` and the special tokens of templates, by id: all but those that mark the unknown, the padding and the start."""
    other = {tokenizer.unk_token, tokenizer.pad_token, tokenizer.bos_token}
    added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    found = {id: text for id, text in added.items() if text not in other}
    return found if tokenizer.eos_token_id is None else found | {tokenizer.eos_token_id: tokenizer.eos_token}
