"""Settings: read strictly, described from their declaration, and wrong ones named in one line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from pydantic import AfterValidator

from posttrain.schema import NonNegativeInt, OpenUnit, Positive, PositiveInt, Probability, UserError, fields, parse, suggest


def _even(value: int) -> int:
    if value % 2:
        raise ValueError("must be even")
    return value


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a test."""

    steps: PositiveInt
    """How many."""

    beta: Positive = 0.1
    """Pull."""

    noise: Probability = 0.0
    """Share."""

    alpha: OpenUnit = 0.5
    """Between."""

    skip: NonNegativeInt = 0
    """Left out."""

    mode: Literal["fast", "slow"] = "fast"
    """Speed."""

    size: Annotated[int, AfterValidator(_even)] = 2
    """Even."""

    path: str | None = None
    """Where."""


def refusal(call: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(UserError) as error:
        call(*args)
    return str(error.value)


def test_reads_what_is_declared() -> None:
    got = parse(Config, {"steps": 3, "beta": "0.25", "mode": "slow", "path": "a"}, "x.yaml")
    assert got == Config(steps=3, beta=0.25, mode="slow", path="a")
    assert isinstance(got.beta, float)


POSSIBLE = "Possible: steps, beta, noise, alpha, skip, mode, size, path"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 1, "bata": 1}, f"x.yaml: unknown key 'bata'; did you mean beta? {POSSIBLE}"),
        ({"steps": 1, "qqq": 1}, f"x.yaml: unknown key 'qqq'. {POSSIBLE}"),
        ({"steps": 1, 7: 1}, f"x.yaml: unknown key 7. {POSSIBLE}"),
        ({}, "x.yaml: steps is required"),
        ({"steps": 0}, "x.yaml: steps = 0: Input should be greater than 0"),
        ({"steps": "many"}, "x.yaml: steps = 'many': Input should be a valid integer, unable to parse string as an integer"),
        ({"steps": 1, "beta": 0}, "x.yaml: beta = 0: Input should be greater than 0"),
        ({"steps": 1, "beta": None}, "x.yaml: beta = None: Input should be a valid number"),
        ({"steps": 1, "beta": float("inf")}, "x.yaml: beta = inf: Input should be a finite number"),
        ({"steps": 1, "beta": float("nan")}, "x.yaml: beta = nan: Input should be a finite number"),
        ({"steps": 1, "noise": 1.5}, "x.yaml: noise = 1.5: Input should be less than or equal to 1"),
        ({"steps": 1, "alpha": 1}, "x.yaml: alpha = 1: Input should be less than 1"),
        ({"steps": 1, "skip": -1}, "x.yaml: skip = -1: Input should be greater than or equal to 0"),
        ({"steps": 1, "mode": "fats"}, "x.yaml: mode = 'fats': Input should be 'fast' or 'slow'"),
        ({"steps": 1, "size": 3}, "x.yaml: size = 3: must be even"),
        (
            {"steps": 0, "beta": -1},
            "x.yaml: steps = 0: Input should be greater than 0; x.yaml: beta = -1: Input should be greater than 0",
        ),
    ],
)
def test_refusals_say_where_what_and_what_is_possible(values: dict[Any, Any], message: str) -> None:
    assert refusal(parse, Config, values, "x.yaml") == message


def test_a_refusal_is_a_value_error() -> None:
    assert issubclass(UserError, ValueError)


def test_fields_are_the_declaration() -> None:
    assert fields(Config) == [
        {"name": "steps", "type": "PositiveInt", "description": "How many."},
        {"name": "beta", "type": "Positive", "description": "Pull.", "default": 0.1},
        {"name": "noise", "type": "Probability", "description": "Share.", "default": 0.0},
        {"name": "alpha", "type": "OpenUnit", "description": "Between.", "default": 0.5},
        {"name": "skip", "type": "NonNegativeInt", "description": "Left out.", "default": 0},
        {"name": "mode", "type": "Literal['fast', 'slow']", "description": "Speed.", "default": "fast"},
        {"name": "size", "type": "Annotated[int, AfterValidator(_even)]", "description": "Even.", "default": 2},
        {"name": "path", "type": "str | None", "description": "Where.", "default": None},
    ]


@pytest.mark.parametrize(
    ("got", "expected"), [("forward_k", "; did you mean forward_kl?"), ("js", "; did you mean js?"), ("zzz", ".")]
)
def test_suggest(got: str, expected: str) -> None:
    assert suggest(got, ["reverse_kl", "forward_kl", "js"]) == expected


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        ("bata", "beta"),
        ("output", "train.output_dir"),
        ("learning_rate", "train.learning_rate or value_learning_rate"),
        ("lr", "train.learning_rate or train.lr_end"),
        ("seed", "data.seed or train.seed"),
        ("otput_dir", "train.output_dir"),
        ("steps", "train.max_steps or train.eval_steps or train.save_steps"),
        ("put", None),
        ("x", None),
    ],
)
def test_suggestions_have_a_word_or_initials_in_common(got: str, expected: str | None) -> None:
    """Those most alike first; where there are none, the nearest in spelling."""
    train = ["output_dir", "learning_rate", "lr_end", "seed", "max_steps", "eval_steps", "save_steps", "logging_steps"]
    names = ["beta", "value_learning_rate", "data.seed", *(f"train.{name}" for name in train)]
    assert suggest(got, names) == (f"; did you mean {expected}?" if expected else ".")
