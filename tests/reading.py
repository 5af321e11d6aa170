"""Reading tiny data sets in tests: settings in, decoded rows or the refusal out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from posttrain.data import Loaded, load
from posttrain.schema import UserError, parse
from posttrain.settings import DataConfig

PAIR = ("chosen", "rejected")
HH = "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: why?\n\nAssistant:"
START = "<s><|im_start|>user\n"
ANSWER = "<|im_end|>\n<|im_start|>assistant\n"

Write = Callable[..., str]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def read(tokenizer: Any, roles: Iterable[str] = PAIR, numbers: Iterable[str] = (), **settings: Any) -> Loaded:
    """Load with these settings."""
    return load(parse(DataConfig, settings, "data"), tokenizer, tuple(roles), tuple(numbers))


def texts(loaded: Loaded, tokenizer: Any, roles: Iterable[str] = PAIR) -> list[tuple[str, ...]]:
    """Each row decoded: the prompt, then the completion of each role."""
    return [(tokenizer.decode(row["prompt"]), *(tokenizer.decode(row[role][0]) for role in roles)) for row in loaded.train]


def refused(tokenizer: Any, roles: Iterable[str] = PAIR, numbers: Iterable[str] = (), **settings: Any) -> str:
    """The one line with which these settings are refused."""
    with pytest.raises(UserError) as error:
        read(tokenizer, roles, numbers, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)
