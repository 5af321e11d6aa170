"""Log-probs kept on disk that are damaged, unfinished, or of another version: one line that says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny

from posttrain.models import attach
from posttrain.reference import CachedLogps
from posttrain.schema import UserError

ROWS = [{"prompt": [3, 4], "chosen": [[5, 6]], "rejected": [[7]]}, {"prompt": [8], "chosen": [[9]], "rejected": [[5, 5, 5]]}]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """The one shard of a cache of four completions."""
    cache, model = CachedLogps(tmp_path, "model", "tiny"), tiny("llama")
    attach(model)
    assert list(cache.fill(model, ROWS, ("chosen", "rejected"), "tree", 2)) == [2]
    (path,) = cache.folder.glob("*.safetensors")
    return path


def read(shard: Path) -> CachedLogps:
    """As another run does."""
    return CachedLogps(shard.parents[2], "model", "tiny")


def test_what_is_kept_is_found_again(shard: Path) -> None:
    (shard.parent / ".interrupted.partial").write_bytes(b"half")
    cache = read(shard)
    assert len(cache) == 4 and not cache.missing(ROWS, ("chosen", "rejected"))
    assert cache.lookup([8], [5, 5, 5])["reference_logps"].shape == (3,)
    with pytest.raises(UserError, match=r"lacks a completion of 1 tokens; run `posttrain logps`"):
        cache.lookup([8], [6])


def test_a_shard_that_breaks_off(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(UserError, match=rf"{shard.name} is damaged \(.*\); delete it and it is computed again"):
        read(shard)


def test_another_number(shard: Path) -> None:
    with safe_open(shard, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(shard)
    tensors["logps"][1] += 1
    save_file(tensors, shard, metadata=metadata)
    with pytest.raises(UserError, match=rf"{shard.name} is damaged \(checksum\); delete it"):
        read(shard)


def test_another_version(shard: Path) -> None:
    save_file(load_file(shard), shard, metadata={"version": "0"})
    with pytest.raises(UserError, match=rf"{shard.name} has version 0, this program reads 1; delete it"):
        read(shard)
