"""For all tests: no hub, caches of their own, tiny tokenizers."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
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
