"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import re
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from posttrain.replacing import replacing


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with text in it."""
    (tmp_path / "x.json").write_text("before")
    return tmp_path / "x.json"


@pytest.fixture
def full() -> Iterator[None]:
    """A disk on which a file has room for 1000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_takes_the_place_when_it_is_written(path: Path) -> None:
    with replacing(path) as partial:
        partial.write_text("after")
        assert path.read_text() == "before" and re.fullmatch(r"\.x\.json\.\w+\.partial", partial.name)
    assert path.read_text() == "after" and names(path.parent) == ["x.json"]


def test_makes_the_folder_and_two_writers_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "x"
    with replacing(path) as one, replacing(path) as other:
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one" and names(path.parent) == ["x"], "whichever is finished last"


def test_a_full_disk_leaves_what_was_there(path: Path, full: None) -> None:
    with pytest.raises(OSError) as error, replacing(path) as partial:
        partial.write_bytes(b"x" * 1001)
    assert error.value.errno == errno.EFBIG and path.read_text() == "before" and names(path.parent) == ["x.json"]


def test_a_writer_that_raises_leaves_what_was_there(path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), replacing(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "before" and names(path.parent) == ["x.json"]


def test_a_folder_is_not_replaced(path: Path) -> None:
    with pytest.raises(IsADirectoryError), replacing(path.parent) as partial:
        partial.write_text("text")
    assert path.read_text() == "before" and not list(path.parent.parent.glob(f".{path.parent.name}*"))
