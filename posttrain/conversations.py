"""Conversations: messages from the forms they come in, and where the completions of a shared prompt begin."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .schema import UserError, suggest

Message = dict[str, Any]
Text = str | list[Message]

_SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    **{role: role for role in ("user", "assistant", "system", "developer", "tool")},
}
"""Names of speakers in the wild -> roles of a chat template."""

TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
"""The start of a turn in a transcript of Anthropic's HH format."""

ANSWER = "\n\nAssistant:"


class Unusable(Exception):
    """A row that cannot be an example; its text is the reason under which it is counted."""


def messages(value: Any, where: str) -> list[Message]:
    """A list of messages, or one, in {role, content} or ShareGPT's {from, value} form, as chat templates take them.

    Raises:
        UserError: anything else, or a speaker nobody knows.
    """
    found = []
    for one in value if isinstance(value, list) else [value]:
        if not isinstance(one, dict) or not ({"role", "from"} & one.keys()):
            raise UserError(
                f"{where} holds a list with {kind_of(one)}, expected messages with role and content (or from and value)"
            )
        speaker = one.get("role") or one.get("from")
        if speaker not in _SPEAKERS:
            raise UserError(
                f"{where}: speaker {speaker!r} is unknown{suggest(str(speaker), [*_SPEAKERS])} Possible: {', '.join(_SPEAKERS)}"
            )
        content = one.get("content", one.get("value"))
        if isinstance(content, list):
            if any(part.get("type") != "text" for part in content):
                raise UserError(f"{where} holds content that is not text; only text is supported")
            content = "".join(part["text"] for part in content)
        more = {key: without_none(entry) for key, entry in one.items() if key not in ("role", "from", "content", "value")}
        kept = {key: entry for key, entry in more.items() if entry is not None}
        found.append({"role": _SPEAKERS[speaker], "content": content or "", **kept})
    return found


def turns(text: str) -> list[Message]:
    """A Human/Assistant transcript as messages; text before the first turn is a system prompt, two turns in a row are one.

    Raises:
        Unusable: it has no turns.
    """
    before, *parts = TURN.split(text)
    if not parts:
        raise Unusable("not a transcript")
    found = [{"role": "system", "content": before.strip()}] if before.strip() else []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        role = {"Human": "user", "Assistant": "assistant"}[speaker]
        if found and found[-1]["role"] == role:
            said = f"{found.pop()['content']}\n\n{said.strip()}"
        found.append({"role": role, "content": said.strip()})
    return found


def common_messages(sides: Sequence[list[Message]]) -> tuple[list[Message], list[list[Message]]]:
    """Conversations -> their leading messages in common (the prompt) and the rest of each (the completions).

    Where nothing differs the completion is the assistant's last turn.
    """
    shared = common(sides)
    if shared == min(len(side) for side in sides):
        while shared and sides[0][shared - 1]["role"] == "assistant":
            shared -= 1
    return sides[0][:shared], [side[shared:] for side in sides]


def common_answer(sides: Sequence[str]) -> int:
    """Where the completions begin in transcripts: after the last `Assistant:` that they have in common."""
    shared = sides[0][: common(sides)]
    if ANSWER not in shared:
        raise Unusable("no prompt in common")
    return shared.rindex(ANSWER) + len(ANSWER)


def common_words(sides: Sequence[str]) -> int:
    """Where texts begin to differ, moved back to a word boundary: a line break stays with the prompt, a space does not."""
    shared = sides[0][: common(sides)]
    at = max(shared.rfind(" "), shared.rfind("\n") + 1)
    if at <= 0:
        raise Unusable("no prompt in common")
    return at


def common(sides: Sequence[Sequence[Any]]) -> int:
    """Number of leading items that all sequences share."""
    shared = 0
    for items in zip(*sides, strict=False):
        if any(item != items[0] for item in items[1:]):
            break
        shared += 1
    return shared


def says_something(text: Text) -> bool:
    """Whether text, or any message but a system prompt, holds more than blanks."""
    if isinstance(text, str):
        return bool(text.strip())
    return any(message["content"].strip() or message.get("tool_calls") for message in text if message["role"] != "system")


def without_none(value: Any) -> Any:
    """Without the keys that Arrow added to make all rows alike."""
    if isinstance(value, dict):
        return {key: without_none(entry) for key, entry in value.items() if entry is not None}
    return [without_none(entry) for entry in value] if isinstance(value, list) else value


def kind_of(value: Any) -> str:
    """What an error calls a value."""
    kinds = {type(None): "nothing", str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return kinds.get(type(value), "a record")
