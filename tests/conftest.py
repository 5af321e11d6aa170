"""For all tests: no hub, caches of their own, tiny tokenizers."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Before anything of Hugging Face is imported; processes that tests start inherit it."""
    caches = tempfile.TemporaryDirectory(prefix="posttrain-tests-")
    config.add_cleanup(caches.cleanup)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_DATASETS_CACHE"] = os.path.join(caches.name, "datasets")
    os.environ["POSTTRAIN_CACHE"] = os.path.join(caches.name, "posttrain")


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """What a command changes for its process is undone: what is logged, and the objectives that its `imports` registered."""
    from posttrain.registry import OBJECTIVES

    ours = [logging.getLogger(name) for name in ("posttrain", "posttrain_kernels")]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in ours]
    known = set(OBJECTIVES)
    yield
    for logger, (handlers, level, propagate) in zip(ours, before, strict=True):
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)
    for name in OBJECTIVES.keys() - known:
        module = OBJECTIVES[name].function.__module__
        if not module.startswith("posttrain."):
            del OBJECTIVES[name]
            sys.modules.pop(module, None)


@pytest.fixture(scope="session")
def tokenizer():
    """With a chat template."""
    from tiny import tiny_tokenizer

    return tiny_tokenizer()


@pytest.fixture(scope="session")
def plain_tokenizer():
    """Without one."""
    from tiny import tiny_tokenizer

    return tiny_tokenizer(chat=False)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Write rows as JSON lines; returns the path."""

    def write(*rows: dict[str, Any], name: str = "rows.jsonl") -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write
