"""Layouts: which columns of a data set hold the prompt and the completions, and how one of its rows becomes an example.

Detected once, from the column names and the first rows, and then applied to every row. What an example needs depends only on
its roles (`("chosen", "rejected")` for pairs, `("completion",)` for one answer, `()` for prompts alone); `ALIASES` is the
table of column names to look for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .conversations import (
    ANSWER,
    TURN,
    Message,
    Text,
    Unusable,
    common_answer,
    common_messages,
    common_words,
    kind_of,
    messages,
    says_something,
    turns,
    without_none,
)
from .schema import UserError, suggest

ALIASES: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "instruction", "question", "query", "input"),
    "input": ("input", "context"),
    "system": ("system", "system_prompt"),
    "tools": ("tools",),
    "messages": ("messages", "conversations", "conversation"),
    "chosen": ("chosen", "chosen_response", "response_chosen", "preferred"),
    "rejected": ("rejected", "rejected_response", "response_rejected", "dispreferred"),
    "completion": ("completion", "response", "output", "answer", "solution"),
    "label": ("label", "is_desirable"),
}
"""What a column is for -> names it goes by, the first match wins. A role or number that is not here goes by its own name."""

_LABELS = {"desirable": 1.0, "undesirable": 0.0, "true": 1.0, "false": 0.0, "1": 1.0, "0": 0.0}
"""Values of a label, as text in lower case."""


@dataclass(frozen=True)
class Example:
    """One prompt and its completions: all messages (a chat template will render them) or all plain text."""

    prompt: Text
    """Everything before the completions."""

    completions: list[Text]
    """One a role; lists of assistant messages, or text that continues the prompt as it stands."""

    tools: list[Any] | None = None
    """Tool descriptions for the chat template."""


@dataclass(frozen=True)
class Layout:
    """How the rows of one data set are read."""

    kind: str
    """`messages`, `transcript` (Human/Assistant turns in text), `request` (an instruction or question), `text`, or `ids`:
    prompt and completions are tokens already, and stay as they are."""

    chat: bool
    """Whether examples are messages for the chat template, or plain text."""

    mapping: Mapping[str, str]
    """What a column is for -> its name."""

    roles: tuple[str, ...]
    """Completions of a row, in order."""

    numbers: Mapping[str, float | None] = field(default_factory=dict)
    """Per-row numbers to carry along (a label, a score) -> what they are where `mapping` has no column for them."""

    repeated: bool = False
    """The completions' text begins with the prompt's text."""

    system: str | None = None
    """System prompt for rows that have none."""

    where: str = "data"
    """How messages call the data set."""

    @property
    def implicit(self) -> bool:
        """Whether the prompt is what the completions have in common."""
        return "prompt" not in self.mapping

    def __str__(self) -> str:
        if self.kind == "ids":
            return "token ids, as they stand"
        prompt = "the common beginning" if self.implicit else "repeated in the completions" if self.repeated else "explicit"
        return f"{self.kind}, prompt {prompt}, {'chat template' if self.chat else 'plain text'}"

    def example(self, row: Mapping[str, Any], number: int) -> Example:
        """The example in a row; `number` counts from 1 and stands in errors.

        Raises:
            Unusable: it has to be left out, and counted.
            UserError: a value of the wrong type.
        """
        sides = [self._text(row, role, number) for role in self.roles]
        prompt = None if self.implicit else self._text(row, "prompt", number)
        if isinstance(prompt, str) and "input" in self.mapping and row[self.mapping["input"]]:
            prompt = f"{prompt}\n\n{row[self.mapping['input']]}"
        prompt, sides = self._chat(prompt, sides) if self.chat else self._plain(prompt, sides)
        if not all(says_something(side) for side in sides):
            raise Unusable("empty completion")
        system = row.get(self.mapping.get("system", "")) or self.system
        if system and isinstance(prompt, str):
            prompt = f"{system}\n\n{prompt}"
        elif system and prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": system}, *prompt]
        return Example(prompt, sides, self._tools(row, number))

    def tokens(self, row: Mapping[str, Any], number: int) -> tuple[list[int], list[list[int]]]:
        """Prompt and completions of a row of token ids; arguments and errors as in `example`."""
        found = {name: row[self.mapping[name]] for name in ("prompt", *self.roles)}
        for name, ids in found.items():
            if ids != [] and not _ids(ids):
                where = f"{self.where}: row {number}: column {self.mapping[name]!r}"
                raise UserError(f"{where} holds {kind_of(ids)}, expected a list of token ids")
        if not all(found.values()):
            raise Unusable("empty completion" if found["prompt"] else "empty prompt")
        return found["prompt"], [found[role] for role in self.roles]

    def _chat(self, prompt: Text | None, sides: list[Text]) -> tuple[list[Message], list[Text]]:
        if self.kind == "transcript":
            prompt, sides = self._turns(prompt, sides)
        else:
            said = isinstance(prompt, str)
            asked = [{"role": "user", "content": prompt}] if said else prompt
            if said and self.repeated:
                sides = [side.removeprefix(prompt) if isinstance(side, str) else side for side in sides]
            sides = [[{"role": "assistant", "content": side}] if isinstance(side, str) else side for side in sides]
            whole = [bool(side) and side[0]["role"] != "assistant" for side in sides]
            if asked is None or (said and sides and all(whole)):
                prompt, sides = common_messages(sides)
            else:
                prompt = asked if sides else _asked(asked)
                sides = [side[len(asked) :] if side[: len(asked)] == asked else side for side in sides]
        if any(message["role"] != "assistant" for side in sides for message in side):
            raise Unusable("completion with another speaker's turn")
        if not says_something(prompt):
            raise Unusable("empty prompt")
        return prompt, sides

    def _turns(self, prompt: str | None, sides: list[str]) -> tuple[list[Message], list[list[Message]]]:
        if not sides:
            return _asked(turns(prompt)), []
        before = "" if self.implicit or self.repeated else prompt
        return common_messages([turns(before + side) for side in sides])

    def _plain(self, prompt: str | None, sides: list[str]) -> tuple[str, list[str]]:
        if prompt is None:
            at = common_answer(sides) if self.kind == "transcript" else common_words(sides)
            prompt, sides = sides[0][:at], [side[at:] for side in sides]
        elif self.repeated:
            sides = [side.removeprefix(prompt) for side in sides]
        elif self.kind == "request":
            prompt = f"{prompt}\n\n"
        if self.kind == "transcript" and any("\n\nHuman:" in side for side in sides):
            raise Unusable("completion with another speaker's turn")
        return prompt, sides

    def _text(self, row: Mapping[str, Any], name: str, number: int) -> Text:
        column = self.mapping.get(name) or self.mapping["messages"]
        got, where = row[column], f"{self.where}: row {number}: column {column!r}"
        expected = "messages" if self.kind == "messages" else "text"
        if isinstance(got, str) and (expected == "text" or name in self.mapping):
            return got
        if expected == "messages" and isinstance(got, (list, dict)):
            return messages(got, where)
        raise UserError(f"{where} holds {kind_of(got)}, expected {expected}")

    def _tools(self, row: Mapping[str, Any], number: int) -> list[Any] | None:
        got = row[self.mapping["tools"]] if "tools" in self.mapping else None
        try:
            got = json.loads(got) if isinstance(got, str) and got else got
        except json.JSONDecodeError:
            raise UserError(f"{self.where}: row {number}: column {self.mapping['tools']!r} is text that is not JSON") from None
        return without_none(got) or None


def detect(
    sample: Sequence[Mapping[str, Any]],
    roles: Sequence[str],
    *,
    numbers: Mapping[str, float | None] | None = None,
    columns: Mapping[str, str] | None = None,
    form: str = "auto",
    template: bool = True,
    markers: Sequence[str] = (),
    system: str | None = None,
    where: str = "data",
) -> Layout:
    """The layout of a data set from its first rows.

    Args:
        sample: rows as dicts, at least one.
        roles: completions that a row must have.
        numbers: columns of numbers -> what they are where there is no such column; None where a row must have it.
        columns: overrides, what a column is for -> its name.
        form: `auto`, `chat` or `plain`.
        template: whether the tokenizer has a chat template.
        markers: special tokens as text; where every row holds one, the text has been through a template and stands as it is.
        system: system prompt for rows that have none.
        where: how errors call the data set.

    Raises:
        UserError: a column is missing or of the wrong type, or messages meet a tokenizer without a chat template.
    """
    columns, numbers = columns or {}, numbers or {}
    mapping = _map(list(sample[0]), roles, numbers, columns, where)
    names = [name for name in ("prompt", *roles) if name in mapping] or ["messages"]
    if "prompt" in mapping and all(_ids(sample[0][mapping[name]]) for name in names):
        if form != "auto" or system is not None:
            raise UserError(f"{where}: rows of token ids are taken as they stand; drop data.format and data.system")
        return Layout("ids", False, mapping, tuple(roles), numbers, where=where)
    no_template = "the tokenizer has no chat template; pass one with --model.chat_template <file>"
    if _shape(sample, mapping, names, where) == "messages":
        if form == "plain":
            raise UserError(
                f"{where}: data.format = 'plain' but column {mapping[names[-1]]!r} holds messages; drop the setting"
            )
        if not template:
            raise UserError(
                f"{where}: column {mapping[names[-1]]!r} holds messages and {no_template}, or use an instruction-tuned model"
            )
        return Layout("messages", True, mapping, tuple(roles), numbers, False, system, where)
    texts = [[row[mapping[name]] for name in names] for row in sample]
    texts = [row for row in texts if all(isinstance(text, str) for text in row)]
    rendered = all(any(marker in text for text in row for marker in markers) for row in texts)
    explicit = "prompt" in mapping
    repeated = explicit and bool(roles) and all(row[0] and all(side.startswith(row[0]) for side in row[1:]) for row in texts)
    kind = "text"
    if not rendered and all(TURN.search(row[0]) and ANSWER in f"\n\n{row[0]}" for row in texts):
        kind = "transcript"
    elif explicit and mapping["prompt"] != "prompt" and "prompt" not in columns:
        kind = "request"
    if form == "chat" and not template:
        raise UserError(f"{where}: data.format = 'chat' and {no_template}")
    if form == "chat" and not explicit and kind == "text":
        raise UserError(f"{where}: data.format = 'chat' needs a prompt column; columns: {', '.join(sample[0])}")
    able = template and not rendered and (explicit or kind == "transcript")
    chat = form == "chat" or (form == "auto" and able)
    return Layout(kind, chat, mapping, tuple(roles), numbers, repeated, system, where)


def _map(
    have: list[str], roles: Sequence[str], numbers: Mapping[str, float | None], columns: Mapping[str, str], where: str
) -> dict[str, str]:
    wanted = {"prompt": False, **dict.fromkeys(roles, True), **{name: absent is None for name, absent in numbers.items()}}
    wanted |= dict.fromkeys(("system", "tools", "messages"), False)
    possible = ["prompt", "input", *list(wanted)[1:]]
    for name, column in columns.items():
        if name not in possible:
            raise UserError(f"{where}: data.columns: unknown {name!r}{suggest(name, possible)} Possible: {', '.join(possible)}")
        if column not in have:
            raise UserError(
                f"{where}: data.columns.{name}: no column {column!r}{suggest(column, have)} Columns: {', '.join(have)}"
            )
    found = dict(columns)
    for name in wanted:
        match = [column for column in ALIASES.get(name, (name,)) if column in have]
        if name not in found and match:
            found[name] = match[0]
    if found.get("prompt") == "instruction" and "input" not in found:
        found.update([("input", column) for column in ALIASES["input"] if column in have][:1])
    if "messages" in found and "prompt" not in found and (len(roles) != 1 or roles[0] in found):
        found["prompt"] = found.pop("messages")
    single = len(roles) == 1 and "messages" in found and roles[0] not in found
    if single:
        found.pop("prompt", None)
    else:
        found.pop("messages", None)
    missing = [name for name, needed in wanted.items() if needed and name not in found and not (single and name in roles)]
    if len(roles) < 2 and not single and "prompt" not in found:
        missing.insert(0, "prompt")
    if missing:
        looked = ", ".join(ALIASES.get(missing[0], (missing[0],)))
        pairs = all(set(ALIASES[side]) & set(have) for side in ("chosen", "rejected"))
        raise UserError(
            f"{where}: no column for {missing[0]!r} (looked for {looked}); columns: {', '.join(have)};"
            f" name one with --data.columns.{missing[0]} <column>"
            + (", or take the pairs apart with --data.unpair true" if roles == ("completion",) and pairs else "")
        )
    return {name: found[name] for name in possible if name in found}


def _shape(sample: Sequence[Mapping[str, Any]], mapping: Mapping[str, str], names: list[str], where: str) -> str:
    """`messages` if any column of text or messages holds messages in the first row that has a value, else `text`."""
    shapes = set()
    for name in names:
        column = mapping[name]
        value = next((row[column] for row in sample if row[column] is not None), None)
        if not isinstance(value, (str, dict, list)):
            raise UserError(f"{where}: row 1: column {column!r} holds {kind_of(value)}, expected text or a list of messages")
        shapes.add("text" if isinstance(value, str) else "messages")
    return "messages" if "messages" in shapes else "text"


def _ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int and one >= 0 for one in value)


def label(value: Any) -> float | None:
    """1 for a desirable completion, 0 for an undesirable one, None for what is no label."""
    return _LABELS.get(f"{value:g}" if isinstance(value, float) else str(value).lower())


def number(value: Any) -> float | None:
    """A number as float, None for anything else."""
    return float(value) if isinstance(value, (bool, int, float)) else None


def _asked(conversation: list[Message]) -> list[Message]:
    """The conversation up to the last turn that is not the assistant's."""
    end = len(conversation)
    while end and conversation[end - 1]["role"] == "assistant":
        end -= 1
    return conversation[:end]
