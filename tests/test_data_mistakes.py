"""What a user is told about data that cannot be used: one line each."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from reading import Write, refused, said, user

from posttrain.loading import Dealt
from posttrain.schema import UserError

GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}
TALK = {"prompt": [user("a")], "chosen": [said("b")], "rejected": [said("c")]}

MISTAKES = {
    "missing column": (
        [{"prompt": "a", "choosen": "b", "rejected": "c"}],
        {},
        "no column for 'chosen' (looked for chosen, chosen_response, response_chosen, preferred); columns: prompt, choosen,"
        " rejected; name one with --data.columns.chosen <column>",
    ),
    "mapping of nothing": ([GOOD], {"columns": {"promt": "a"}}, "unknown 'promt'; did you mean prompt?"),
    "mapping to nothing": ([GOOD], {"columns": {"prompt": "chose"}}, "no column 'chose'; did you mean chosen?"),
    "split": ([GOOD], {"split": "test"}, "no split 'test'; splits: train"),
    "slice of no split": ([GOOD], {"split": "test[:2]"}, "Unknown split"),
    "wrong type": ([GOOD, GOOD | {"chosen": 3}], {}, "row 2: column 'chosen' holds a number, expected text"),
    "null": ([GOOD, GOOD | {"rejected": None}], {}, "row 2: column 'rejected' holds nothing, expected text"),
    "wrong type everywhere": (
        [GOOD | {"chosen": 3}],
        {},
        "column 'chosen' holds a number, expected text or a list of messages",
    ),
    "messages and text": ([GOOD, TALK], {}, "row 2: column 'chosen' holds a list, expected text"),
    "speaker": ([TALK | {"prompt": [{"role": "usr", "content": "a"}]}], {}, "speaker 'usr' is unknown; did you mean user?"),
    "tools": ([GOOD | {"tools": "{"}], {}, "row 1: column 'tools' is text that is not JSON"),
    "messages as plain text": ([TALK], {"format": "plain"}, "data.format = 'plain' but column 'rejected' holds messages"),
    "chat without a prompt": ([{"chosen": "a b", "rejected": "a c"}], {"format": "chat"}, "needs a prompt column"),
    "subset of a file": ([GOOD], {"subset": "x"}, "a local one has none"),
    "two ways to evaluate": ([GOOD], {"eval": "x", "eval_size": 3}, "eval and eval_size exclude each other"),
    "ignored setting": ([GOOD], {"shuffle_buffer": 3}, "shuffle_buffer is for streaming: true"),
    "name and mixture": ([GOOD], {"mixture": [{"name": "x"}]}, "name and mixture exclude each other"),
    "no common beginning": ([{"chosen": "a", "rejected": "b"}], {}, "none of 1 rows can be used: 1 no prompt in common"),
    "policy": ([GOOD], {"too_long": "cut"}, "too_long = 'cut': Input should be 'drop', 'truncate_prompt' or 'error'"),
    "empty file": ([], {}, "the file is empty"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name: str, write: Write, tokenizer: Any) -> None:
    rows, settings, message = MISTAKES[name]
    assert message in refused(tokenizer, name=write(*rows), **settings)


def test_mistakes_of_label_and_prompt(write: Write, tokenizer: Any) -> None:
    row = {"prompt": "a", "completion": "b", "label": "good"}
    assert "row 1: column 'label' holds 'good', expected true, false, 1, 0, desirable or undesirable" in refused(
        tokenizer, ("completion",), ("label",), name=write(row)
    )
    assert "no column for 'label'" in refused(
        tokenizer, ("completion",), ("label",), name=write({"prompt": "a", "answer": "b"})
    )
    assert "no column for 'prompt'" in refused(tokenizer, ("completion",), name=write({"answer": "b"}))


def test_messages_need_a_chat_template(write: Write, plain_tokenizer: Any) -> None:
    assert "pass one with --model.chat_template <file>" in refused(plain_tokenizer, name=write(TALK))
    assert "data.format = 'chat' and the tokenizer has no chat template" in refused(
        plain_tokenizer, name=write(GOOD), format="chat"
    )


def test_data_that_cannot_be_read(tmp_path: Path, write: Write, tokenizer: Any) -> None:
    path = write(GOOD)
    assert f"{tmp_path}/row.jsonl: no such file or folder; did you mean rows.jsonl?" in refused(
        tokenizer, name=f"{tmp_path}/row.jsonl"
    )
    assert "the hub cannot be reached (HF_HUB_OFFLINE is set)" in refused(tokenizer, name="somebody/pairs")
    Path(path).write_text('{"prompt": "a"}\n{"prom\n')
    assert refused(tokenizer, name=path).startswith(f"data {path}: ")
    (tmp_path / "rows.xls").write_text("x")
    assert "files of this kind are not read" in refused(tokenizer, name=f"{tmp_path}/rows.xls")
    assert "name is required" in refused(tokenizer)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("damage", ["cut.parquet", "flipped.parquet", "cut.jsonl", "cut.jsonl.gz"])
def test_a_damaged_file_is_one_line(tmp_path: Path, tokenizer: Any, damage: str, streaming: bool) -> None:
    rows = Dataset.from_list([GOOD | {"prompt": f"a {number}"} for number in range(500)])
    path = tmp_path / damage
    if path.suffix == ".parquet":
        rows.to_parquet(path)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if "cut" in damage else whole[:200] + bytes(60) + whole[260:])
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        packed = gzip.compress(text)
        path.write_bytes(packed[: len(packed) // 2] if path.suffix == ".gz" else text[:-30])
    line = refused(tokenizer, name=str(path), streaming=streaming)
    assert line.startswith(f"data {path}: ") and "\n" not in line


def test_a_stream_may_break_off_while_it_is_used() -> None:
    def rows():
        yield from ({"prompt": [1]}, {"prompt": [2]})
        raise OSError("Corrupt snappy compressed data.")

    stream = iter(Dealt(rows(), 2, 1, 0, drop_last=False))
    assert [next(stream), next(stream)] == [{"prompt": [1]}, {"prompt": [2]}]
    with pytest.raises(UserError, match="data: a stream broke off: Corrupt snappy compressed data"):
        next(stream)


def test_a_template_that_refuses_a_row(write: Write) -> None:
    from tiny import tiny_tokenizer

    strict = tiny_tokenizer()
    strict.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + strict.chat_template
    )
    assert "row 1: the chat template refuses it: no system" in refused(strict, name=write(GOOD), system="be")
