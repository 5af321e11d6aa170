"""Training in several processes is the training of one, with every engine; tests/exactness.py says what is compared."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import pytest
from exactness import ENGINES, differences, every_name

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")

FEW = ["dpo", "kto", "sparsepo", "kd/adapter"]
"""A reference model, a pass before each step, parameters of its own and the reference's layers, the adapter switched off."""


@pytest.mark.multi
@needs_deepspeed
def test_a_few_under_zero3() -> None:
    assert max(differences("zero3", FEW).values()) <= ENGINES["zero3"].tolerance


@pytest.fixture(scope="module")
def table() -> Callable[[str], dict[str, float]]:
    """The column of an engine, all names trained in one launch."""
    return functools.cache(lambda engine: differences(engine, every_name()))


@pytest.mark.slow
@pytest.mark.multi
@needs_deepspeed
@pytest.mark.parametrize("name", every_name())
@pytest.mark.parametrize("engine", ENGINES)
def test_every_objective_and_engine(engine: str, name: str, table: Callable[[str], dict[str, float]]) -> None:
    assert table(engine)[name] <= ENGINES[engine].tolerance
