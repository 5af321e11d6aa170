"""Strings that completions end before (`sampling.stop`), alike for all engines.

An engine may end a completion when its text has come to a string, which saves time, or sample on: what counts is the cut that
all of them make afterwards. It is one between tokens, so that ids and log-probs stay those that were sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .rollout import Rollout, text_after

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PARTIAL = 4
"""Tokens before those of a string whose bytes may be the rest of a character."""


@dataclass(frozen=True)
class Stop:
    """Where a completion ends by its text."""

    strings: Sequence[str]
    """What it ends before; none: nowhere."""

    tokenizer: PreTrainedTokenizerBase | None
    """Of the model; needed where there are strings."""

    def __post_init__(self) -> None:
        assert not self.strings or self.tokenizer is not None, "stop strings are found in text, which takes a tokenizer"

    def cut(self, one: Rollout) -> Rollout:
        """A rollout as far as its text lies before the first of the strings; it is then finished."""
        kept = self.kept(one.prompt, one.completion)
        if kept is None:
            return one
        logps = None if one.logps is None else one.logps[:kept]
        return replace(one, completion=one.completion[:kept], logps=logps, finished=True)

    def kept(self, prompt: Sequence[int], tokens: Sequence[int]) -> int | None:
        """How many of a completion's tokens lie wholly before the first of the strings in its text; None: it has none."""
        if not self.strings:
            return None
        text = text_after(prompt, tokens, self.tokenizer)
        places = [at for at in map(text.find, self.strings) if at >= 0]
        if not places:
            return None
        before, counts = text[: min(places)], range(len(tokens), -1, -1)
        return next(count for count in counts if before.startswith(text_after(prompt, tokens[:count], self.tokenizer)))

    def reached(self, prompt: Sequence[int], tokens: Sequence[int]) -> bool:
        """Whether the last of a completion's tokens, which come one at a time, has brought one of the strings.

        All of the text is read only where the end of it has one: every token of a string has at least one of its bytes.
        """
        longest = max(len(string.encode()) for string in self.strings) + _PARTIAL
        end = self.tokenizer.decode(tokens[-longest:], skip_special_tokens=True)
        return any(string in end for string in self.strings) and self.kept(prompt, tokens) is not None
