"""A teacher on disk: what is read is what was written, a crash loses the unfinished shard, damage is named."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tiny_models import VOCABULARY, tiny

from posttrain.models import attach
from posttrain.reference import FrozenModel, Teachers, sequence_key
from posttrain.schema import UserError
from posttrain.stats import Top
from posttrain.teacher_cache import CachedTeacher, Entry
from posttrain.teacher_fill import computed

ROLES = ["completion"]
K = 3


def rows(count: int = 10) -> list[dict[str, list]]:
    """Prompts and completions of 1 to 5 tokens."""
    return [{"prompt": [7, i], "completion": [[3 + (i + j) % 60 for j in range(1 + i % 5)]]} for i in range(count)]


def invented(row: dict[str, list]) -> tuple[bytes, Entry]:
    """What a teacher might say of a row: numbers that follow from its ids."""
    (completion,) = row["completion"]
    own = -np.array(completion, dtype=np.float32) / 7 - row["prompt"][1] / 100
    logps = np.log(np.array([0.5, 0.3, 0.1], dtype=np.float32))[None] + own[:, None] / 100
    ids = np.array(completion)[:, None] + np.arange(K)
    return sequence_key(row["prompt"], completion), Entry(ids=ids, logps=logps.astype(np.float32), own=own)


def cache(folder: Path, **settings: object) -> CachedTeacher:
    return CachedTeacher(folder, **({"k": K, "size": VOCABULARY, "name": "someone"} | settings))


def filled(folder: Path, of: list[dict[str, list]], tokens: int = 8) -> CachedTeacher:
    """A cache of invented answers in shards of at least `tokens` tokens."""
    made = cache(folder)
    made.shard_tokens = tokens
    assert list(made.keep([invented(row)] for row in of))[-1] == len(of)
    made.reload()
    return made


def same(one: CachedTeacher, other: CachedTeacher, of: list[dict[str, list]]) -> bool:
    found = [[c.lookup(row["prompt"], row["completion"][0]) for row in of] for c in (one, other)]
    return all(np.array_equal(x[name], y[name]) for x, y in zip(*found, strict=True) for name in x)


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    made = filled(tmp_path, rows())
    assert len(made) == 10 and made.missing(rows(12), ROLES) == rows(12)[10:]
    for row in rows():
        _, entry = invented(row)
        found = made.lookup(row["prompt"], row["completion"][0])
        assert found["top_ids"].dtype == np.int64 and np.array_equal(found["top_ids"], entry.ids)
        assert np.array_equal(found["top_reference_logps"], entry.logps)
        assert np.array_equal(found["reference_logps"], entry.own)
    made.verify()
    assert same(pickle.loads(pickle.dumps(made)), made, rows())


def test_a_shard_is_as_documented(tmp_path: Path) -> None:
    """6 k + 8 bytes a token, 8 k + 8 where ids are beyond 65,536; the tail is what the items leave of 1."""
    made = filled(tmp_path, rows(), tokens=100)
    (path,) = tmp_path.glob("*.safetensors")
    with safe_open(path, framework="numpy") as shard:
        found = {name: shard.get_tensor(name) for name in ("ids", "logps", "tail", "own")}
    assert sum(values.nbytes for values in found.values()) == len(found["own"]) * (6 * K + 8)
    assert np.allclose(np.exp(found["logps"]).sum(1) + np.exp(found["tail"]), 1, atol=1e-6)
    assert made.tail() == pytest.approx(np.exp(found["tail"]).mean())
    wide = cache(tmp_path / "wide", size=70_000)
    key, entry = invented(rows()[0])
    list(wide.keep([[(key, Entry(ids=entry.ids + 69_000, logps=entry.logps, own=entry.own))]]))
    wide.reload()
    assert wide.lookup(rows()[0]["prompt"], rows()[0]["completion"][0])["top_ids"].max() > 2**16


def test_the_same_answers_give_the_same_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        filled(tmp_path / name, rows())
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert files[0] == files[1] and len(files[0]) > 1


def test_what_came_before_a_failure_is_kept(tmp_path: Path) -> None:
    def answers():
        yield [invented(rows()[0])]
        raise UserError("the teacher is gone")

    with pytest.raises(UserError, match="gone"):
        list(cache(tmp_path).keep(answers()))
    assert len(cache(tmp_path)) == 1


def test_impossible_items_are_finite(tmp_path: Path) -> None:
    made = cache(tmp_path)
    entry = Entry(ids=np.array([[1, 2, 3]]), logps=np.array([[0.0, -np.inf, -np.inf]]), own=np.array([-np.inf]))
    list(made.keep([[(sequence_key([1], [4]), entry)]]))
    made.reload()
    found = made.lookup([1], [4])
    assert found["top_reference_logps"].tolist() == [[0, -9999, -9999]] and found["reference_logps"].tolist() == [-9999]


_CHILD = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_teacher_cache as t
replace, written = os.replace, []
def stuck(beside, path):
    if len(written) == 2:
        print("writing the third", flush=True)
        time.sleep(600)
    written.append(path)
    replace(beside, path)
os.replace = stuck
t.filled(Path({folder!r}), t.rows(40))
"""


def test_a_killed_process_loses_the_unfinished_shard_only(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    script = _CHILD.format(tests=str(Path(__file__).parent), folder=str(folder))
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "writing the third\n"
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert len(list(folder.glob(".*.partial"))) == 1  # written in full, but not yet a shard
    left = cache(folder)
    kept = [row for row in rows(40) if row not in left.missing(rows(40), ROLES)]
    assert len(list(folder.glob("*.safetensors"))) == 2 and kept == rows(40)[: len(kept)]
    assert 16 <= sum(len(row["completion"][0]) for row in kept) <= 24  # two shards of at least 8 tokens
    again = filled(folder, left.missing(rows(40), ROLES))
    assert again.missing(rows(40), ROLES) == [] and len(again) == 40
    assert same(again, filled(tmp_path / "whole", rows(40)), rows(40))


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["ids", "logps", "tail", "own"])
def test_a_flipped_bit_is_found_where_it_is_read(tmp_path: Path, name: str) -> None:
    filled(tmp_path, rows())
    path = sorted(tmp_path.glob("*.safetensors"))[1]
    with safe_open(path, framework="numpy") as shard:
        offset = path.read_bytes().index(shard.get_tensor(name).tobytes())
    damage(path, offset)
    hurt = cache(tmp_path)
    with pytest.raises(UserError) as error:
        hurt.verify()
    assert str(error.value) == (
        f"teacher: {path} is damaged (checksum of tokens 0 to {_first_length(path)}); delete it, and `posttrain logps` asks "
        "for its part again"
    )
    path.unlink()
    left = cache(tmp_path)
    assert 0 < len(left.missing(rows(), ROLES)) < 10
    left.verify()


def _first_length(path: Path) -> int:
    with safe_open(path, framework="numpy") as shard:
        return int(shard.get_tensor("lengths")[0])


def test_a_shard_that_is_cut_or_has_a_wrong_index_is_named(tmp_path: Path) -> None:
    filled(tmp_path, rows())
    path = sorted(tmp_path.glob("*.safetensors"))[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=rf"{path.name} is damaged .*delete it, and `posttrain logps` asks"):
        cache(tmp_path)
    path.write_bytes(whole)
    with safe_open(path, framework="numpy") as shard:
        offset = whole.index(shard.get_tensor("keys").tobytes())
    damage(path, offset)
    with pytest.raises(UserError, match=rf"{path.name} is damaged \(checksum of its index\)"):
        cache(tmp_path)


def test_a_completion_that_is_not_there_names_the_command(tmp_path: Path) -> None:
    made = filled(tmp_path, rows())
    with pytest.raises(UserError) as error:
        made.lookup([7, 0], [9, 9])
    assert str(error.value) == (
        f"teacher: {tmp_path} lacks a completion of 2 tokens; `posttrain logps` with this recipe adds what is missing"
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_model_says_the_same_whatever_it_is_asked_with(tmp_path: Path, temperature: float) -> None:
    """Against its logits, by the definition, cut to the tokens in common; rows alone or together, in either layout."""
    model = tiny("llama")
    attach(model)
    common, student = VOCABULARY - 4, tiny("llama", seed=1)
    taught = Teachers([FrozenModel(model, "someone")], [1.0], common)
    top, found = Top(k=K, temperature=temperature), []
    for layout, size in (("tree", 1), ("tree", 4), ("separate", 3)):
        asked = computed(taught, student, rows(), ROLES, top, layout, size, "cpu")
        found.append({key: entry for answer in asked for key, entry in answer})
    assert len(found[0]) == 10
    for row in rows():
        (completion,) = row["completion"]
        ids = torch.tensor([[*row["prompt"], *completion]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, 1:-1, :common]
        logps, items = (logits / temperature).log_softmax(-1).topk(K)
        own = logits.log_softmax(-1).gather(1, ids[0, 2:, None])[:, 0]
        for each in found:
            entry = each[sequence_key(row["prompt"], completion)]
            assert np.array_equal(entry.ids, items.numpy())
            assert np.abs(entry.logps - logps.numpy()).max() < 2e-6 and np.abs(entry.own - own.numpy()).max() < 2e-6
