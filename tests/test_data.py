"""Data sets as tokenised rows: layouts, boundaries, cuts and counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from reading import ANSWER, HH, PAIR, START, Write, read, refused, said, texts, user

from posttrain.conversations import common_words
from posttrain.schema import UserError

LAYOUTS = {
    "prompt and answers": (
        {"prompt": "why?", "chosen": "so", "rejected": "no"},
        "text, prompt explicit, chat template",
        (f"{START}why?{ANSWER}", "so<|im_end|>", "no<|im_end|>"),
    ),
    "instruction and input": (
        {"instruction": "add", "input": "1 2", "output": "3", "chosen": "so", "rejected": "no"},
        "request, prompt explicit, chat template",
        (f"{START}add\n\n1 2{ANSWER}", "so<|im_end|>", "no<|im_end|>"),
    ),
    "instruction and empty input": (
        {"instruction": "add", "input": "", "chosen": "so", "rejected": "no"},
        "request, prompt explicit, chat template",
        (f"{START}add{ANSWER}", "so<|im_end|>", "no<|im_end|>"),
    ),
    "messages with a prompt": (
        {"prompt": [user("why?")], "chosen": [said("so")], "rejected": [said("no")]},
        "messages, prompt explicit, chat template",
        (f"{START}why?{ANSWER}", "so<|im_end|>", "no<|im_end|>"),
    ),
    "messages that repeat the prompt": (
        {"prompt": [user("why?")], "chosen": [user("why?"), said("so")], "rejected": [user("why?"), said("no")]},
        "messages, prompt explicit, chat template",
        (f"{START}why?{ANSWER}", "so<|im_end|>", "no<|im_end|>"),
    ),
    "messages without a prompt": (
        {"chosen": [user("a"), said("b"), user("c"), said("so")], "rejected": [user("a"), said("b"), user("c"), said("no")]},
        "messages, prompt the common beginning, chat template",
        (f"{START}a{ANSWER}b<|im_end|>\n<|im_start|>user\nc{ANSWER}", "so<|im_end|>", "no<|im_end|>"),
    ),
    "UltraFeedback": (
        {"prompt": "why?", "chosen": [user("why?"), said("so")], "rejected": [user("why?"), said("no")], "score_chosen": 9.0},
        "messages, prompt explicit, chat template",
        (f"{START}why?{ANSWER}", "so<|im_end|>", "no<|im_end|>"),
    ),
    "text prompt, one message an answer": (
        {"prompt": "why?", "chosen": [said("so")], "rejected": [said("no")]},
        "messages, prompt explicit, chat template",
        (f"{START}why?{ANSWER}", "so<|im_end|>", "no<|im_end|>"),
    ),
    "ShareGPT": (
        {
            "conversations": [{"from": "system", "value": "be"}, {"from": "human", "value": "why?"}],
            "chosen": {"from": "gpt", "value": "so"},
            "rejected": {"from": "gpt", "value": "no"},
        },
        "messages, prompt explicit, chat template",
        (f"<s><|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nwhy?{ANSWER}", "so<|im_end|>", "no<|im_end|>"),
    ),
    "HH": (
        {"chosen": f"{HH} so", "rejected": f"{HH} no"},
        "transcript, prompt the common beginning, chat template",
        (f"{START}hi{ANSWER}yo<|im_end|>\n<|im_start|>user\nwhy?{ANSWER}", "so<|im_end|>", "no<|im_end|>"),
    ),
    "HH with a prompt": (
        {"prompt": HH, "chosen": " so", "rejected": " no"},
        "transcript, prompt explicit, chat template",
        (f"{START}hi{ANSWER}yo<|im_end|>\n<|im_start|>user\nwhy?{ANSWER}", "so<|im_end|>", "no<|im_end|>"),
    ),
    "HH with a prompt, repeated": (
        {"prompt": HH, "chosen": f"{HH} so", "rejected": f"{HH} no"},
        "transcript, prompt repeated in the completions, chat template",
        (f"{START}hi{ANSWER}yo<|im_end|>\n<|im_start|>user\nwhy?{ANSWER}", "so<|im_end|>", "no<|im_end|>"),
    ),
    "system column": (
        {"system": "be", "question": "why?", "chosen": "so", "rejected": "no"},
        "request, prompt explicit, chat template",
        (f"<s><|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nwhy?{ANSWER}", "so<|im_end|>", "no<|im_end|>"),
    ),
    "tools": (
        {"prompt": [user("why?")], "chosen": [said("so")], "rejected": [said("no")], "tools": [{"name": "f"}, {"name": "g"}]},
        "messages, prompt explicit, chat template",
        (f"<s><|im_start|>tools\nf\ng\n<|im_end|>\n<|im_start|>user\nwhy?{ANSWER}", "so<|im_end|>", "no<|im_end|>"),
    ),
    "tools as JSON": (
        {"prompt": "why?", "chosen": "so", "rejected": "no", "tools": '[{"name": "f"}]'},
        "text, prompt explicit, chat template",
        (f"<s><|im_start|>tools\nf\n<|im_end|>\n<|im_start|>user\nwhy?{ANSWER}", "so<|im_end|>", "no<|im_end|>"),
    ),
    "text without a prompt": (
        {"chosen": "one two three", "rejected": "one two thirty"},
        "text, prompt the common beginning, plain text",
        ("<s>one two", " three<|im_end|>", " thirty<|im_end|>"),
    ),
    "text that is rendered already": (
        {"prompt": f"{START}why?{ANSWER}", "chosen": "so<|im_end|>\n", "rejected": "no<|im_end|>\n"},
        "text, prompt explicit, plain text",
        (f"{START}why?{ANSWER}", "so<|im_end|>", "no<|im_end|>"),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str, write: Write, tokenizer: Any) -> None:
    row, layout, expected = LAYOUTS[name]
    loaded = read(tokenizer, name=write(row))
    assert texts(loaded, tokenizer) == [expected]
    assert loaded.report.train[0].layout == layout
    assert loaded.report.train[0].example == dict(zip(("prompt", *PAIR), expected, strict=True))
    assert loaded.train.column_names == ["prompt", *PAIR]


def test_token_ids_are_those_of_the_template_once(write: Write, tokenizer: Any) -> None:
    row = read(tokenizer, name=write({"prompt": "why?", "chosen": "so", "rejected": "no"})).train[0]
    prompt = tokenizer.apply_chat_template([user("why?")], add_generation_prompt=True)["input_ids"]
    full = tokenizer.apply_chat_template([user("why?"), said("so")])["input_ids"]
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert row["prompt"] == prompt and prompt.count(tokenizer.bos_token_id) == 1
    assert prompt + row["chosen"][0] + newline == full
    assert row["rejected"] == [[*tokenizer("no", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]]


PLAIN = {
    "prompt": ({"prompt": "Q: why? A:", "chosen": " so", "rejected": " no"}, ("<s>Q: why? A:", " so</s>", " no</s>")),
    "bos and eos in the text": (
        {"prompt": "<s>Q:", "chosen": " so</s>", "rejected": " no</s>\n"},
        ("<s>Q:", " so</s>", " no</s>"),
    ),
    "question": ({"question": "why?", "chosen": "so", "rejected": "no"}, ("<s>why?\n\n", "so</s>", "no</s>")),
    "repeated": ({"prompt": "why?", "chosen": "why? so", "rejected": "why? not"}, ("<s>why?", " so</s>", " not</s>")),
    "HH": ({"chosen": f"{HH} so", "rejected": f"{HH} no"}, (f"<s>{HH}", " so</s>", " no</s>")),
    "HH with a prompt": ({"prompt": HH, "chosen": " so", "rejected": " no"}, (f"<s>{HH}", " so</s>", " no</s>")),
    "system": ({"system": "be", "prompt": "Q:", "chosen": " so", "rejected": " no"}, ("<s>be\n\nQ:", " so</s>", " no</s>")),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_text_without_a_chat_template(name: str, write: Write, plain_tokenizer: Any) -> None:
    row, expected = PLAIN[name]
    assert texts(read(plain_tokenizer, name=write(row)), plain_tokenizer) == [expected]


def test_format_plain_leaves_text_alone(write: Write, tokenizer: Any) -> None:
    loaded = read(tokenizer, name=write({"prompt": HH, "chosen": " so", "rejected": " no"}), format="plain")
    assert texts(loaded, tokenizer) == [(f"<s>{HH}", " so<|im_end|>", " no<|im_end|>")]


@pytest.mark.parametrize(
    ("sides", "prompt"),
    [
        (("a cat", "a dog"), "a"),
        (("a cat", "a cats"), "a"),
        (("Q: x\nyes", "Q: x\nno"), "Q: x\n"),
        (("Q: x\nyes", "Q: x\nyet"), "Q: x\n"),
        (("one two", "one two"), "one"),
        (("one two", "one two three"), "one"),
    ],
)
def test_texts_are_split_between_words(sides: tuple[str, str], prompt: str) -> None:
    assert sides[0][: common_words(sides)] == prompt


def test_other_families(write: Write, tokenizer: Any) -> None:
    path = write({"question": "why?", "solution": "so", "label": True}, {"question": "how?", "solution": "no", "label": False})
    kto = read(tokenizer, ("completion",), ("label",), name=path)
    assert texts(kto, tokenizer, ("completion",)) == [
        (f"{START}why?{ANSWER}", "so<|im_end|>"),
        (f"{START}how?{ANSWER}", "no<|im_end|>"),
    ]
    assert list(kto.train["label"]) == [1.0, 0.0]
    whole = read(tokenizer, ("completion",), name=write({"messages": [user("a"), said("b"), user("c"), said("d")]}))
    assert texts(whole, tokenizer, ("completion",)) == [
        (f"{START}a{ANSWER}b<|im_end|>\n<|im_start|>user\nc{ANSWER}", "d<|im_end|>")
    ]
    prompts = read(tokenizer, (), name=write({"prompt": HH}))
    assert texts(prompts, tokenizer, ()) == [(f"{START}hi{ANSWER}yo<|im_end|>\n<|im_start|>user\nwhy?{ANSWER}",)]


def test_a_merge_across_the_boundary_moves_it(write: Write, plain_tokenizer: Any) -> None:
    rows = [{"prompt": "Q: ", "chosen": "yes", "rejected": "no"}, {"prompt": "Q:", "chosen": " yes", "rejected": " no"}]
    loaded = read(plain_tokenizer, name=write(*rows))
    assert texts(loaded, plain_tokenizer) == [("<s>Q:", " yes</s>", " no</s>")] * 2
    assert [row["chosen"][0] for row in loaded.train] == [[264, 2]] * 2
    assert loaded.report.train[0].marks["boundary"] == 1


def test_a_template_that_opens_the_answer_in_another_way(write: Write, tokenizer: Any) -> None:
    from tiny import tiny_tokenizer

    thinking = tiny_tokenizer()
    thinking.chat_template = thinking.chat_template.replace("assistant\n{% endif", "assistant\n<t>\n{% endif")
    assert thinking.chat_template != tokenizer.chat_template
    loaded = read(thinking, name=write({"prompt": "why?", "chosen": "so", "rejected": "no"}))
    assert texts(loaded, thinking) == [(f"{START}why?{ANSWER}", "so<|im_end|>", "no<|im_end|>")]
    assert loaded.report.train[0].marks["boundary"] == 1 and "not a prefix" in loaded.report.warnings[0]
    thinking.chat_template = thinking.chat_template.replace("<t>", "<thinking aloud>")
    assert "1 prompt rendered in another way with its answer" in refused(thinking, name=write(*[LAYOUTS["UltraFeedback"][0]]))


def test_a_template_without_an_end_gets_eos(write: Write) -> None:
    from tiny import tiny_tokenizer

    bare = tiny_tokenizer()
    bare.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    bare.chat_template = bare.chat_template.replace("{{ m.role }}", "{{ 'A' if m.role == 'assistant' else 'Q' }}")
    loaded = read(bare, name=write({"prompt": "why?", "chosen": "so", "rejected": "no"}))
    assert texts(loaded, bare) == [("Q: why?\nA:", " so\n<|im_end|>", " no\n<|im_end|>")]


LONG = {"prompt": "abcdefgh", "chosen": "xyz", "rejected": "x"}
"""With the plain tokenizer: <s> and 7 tokens, then 4 and 2 with eos; 12 together."""


def test_too_long_is_dropped_cut_or_refused_and_counted(write: Write, plain_tokenizer: Any) -> None:
    path = write(
        LONG, {"prompt": "ab", "chosen": "x", "rejected": "y"}, {"prompt": "a", "chosen": "0123456789", "rejected": "y"}
    )
    fits = read(plain_tokenizer, name=path, max_length=13)
    assert fits.report.train[0].outcomes == {"kept": 3}
    assert fits.report.train[0].lengths == {
        "prompt_tokens": (2, 8, 8),
        "completion_tokens": (4, 11, 11),
        "tokens": (12, 13, 13),
    }
    dropped = read(plain_tokenizer, name=path, max_length=11)
    assert texts(dropped, plain_tokenizer) == [("<s>ab", "x</s>", "y</s>")]
    assert dropped.report.train[0].outcomes == {"kept": 1, "too long": 2}
    assert dropped.report.warnings == [
        f"{path} (train): 2 of 3 rows (67%) are longer than data.max_length = 11; 64 would hold 98% of them"
    ]
    cut = read(plain_tokenizer, name=path, max_length=11, too_long="truncate_prompt")
    assert texts(cut, plain_tokenizer) == [("<s>cdefgh", "xyz</s>", "x</s>"), ("<s>ab", "x</s>", "y</s>")]
    assert cut.report.train[0].outcomes == {"kept": 2, "completion too long": 1} and cut.report.train[0].marks["truncated"] == 1
    short = read(plain_tokenizer, name=path, max_prompt=3, too_long="truncate_prompt")
    assert texts(short, plain_tokenizer)[0] == ("<s>gh", "xyz</s>", "x</s>")
    assert short.report.warnings == [
        f"{path} (train): 1 of 3 prompts (33%) are longer than data.max_prompt = 3; 64 would hold 98% of them"
    ]
    assert "2 of 3 rows: too long, the first is row 1 with 12 tokens" in refused(
        plain_tokenizer, name=path, max_length=11, too_long="error"
    )
    assert refused(plain_tokenizer, name=write(LONG), max_length=8).endswith(
        "none of 1 rows can be used: 1 too long (data.max_length = 8; 64 would hold 98% of them)"
    )


def test_identical_and_empty_rows_are_counted(write: Write, tokenizer: Any) -> None:
    good, same = {"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b", "rejected": "b"}
    empty, blank = {"prompt": "a", "chosen": " ", "rejected": "c"}, {"prompt": " ", "chosen": "b", "rejected": "c"}
    path = write(good, same, empty, blank)
    report = read(tokenizer, name=path).report.train[0]
    assert report.outcomes == {"kept": 1, "identical": 1, "empty completion": 1, "empty prompt": 1}
    assert report.marks["identical"] == 1
    assert "4 rows, 1 kept, 3 dropped (identical 1, empty completion 1, empty prompt 1)" in str(report)
    assert texts(read(tokenizer, name=path, identical="keep"), tokenizer)[1][1:] == ("b<|im_end|>", "b<|im_end|>")
    assert "1 of 4 rows: identical, the first is row 2" in refused(tokenizer, name=path, identical="error")
    assert "1 of 4 rows: empty completion, the first is row 3" in refused(tokenizer, name=path, empty="error")


def test_identical_pairs_without_a_prompt(write: Write, tokenizer: Any) -> None:
    for side in (f"{HH} so", "one two", [user("a"), said("b")]):
        loaded = read(tokenizer, name=write({"chosen": side, "rejected": side}), identical="keep")
        prompt, chosen, rejected = texts(loaded, tokenizer)[0]
        assert chosen == rejected and len(chosen) > len("<|im_end|>") and prompt


def test_an_answer_with_another_speaker_is_left_out(write: Write, tokenizer: Any, plain_tokenizer: Any) -> None:
    rows = [
        {"chosen": f"{HH} so", "rejected": f"{HH} no"},
        {"chosen": f"{HH} so\n\nHuman: x\n\nAssistant: y", "rejected": f"{HH} no"},
    ]
    for one in (tokenizer, plain_tokenizer):
        outcomes = read(one, name=write(*rows)).report.train[0].outcomes
        assert outcomes == {"kept": 1, "completion with another speaker's turn": 1}


@pytest.mark.parametrize("ending", ["json", "parquet", "csv", "tsv", "folder", "saved", "gz"])
def test_file_formats(ending: str, tmp_path: Path, plain_tokenizer: Any) -> None:
    import datasets

    rows = [{"prompt": "Q:", "chosen": " so", "rejected": " no"}, {"prompt": "R:", "chosen": " a", "rejected": " b"}]
    path = tmp_path / ("rows.jsonl.gz" if ending == "gz" else f"rows.{ending}")
    table = datasets.Dataset.from_list(rows)
    match ending:
        case "json":
            path.write_text(json.dumps(rows))
        case "parquet":
            table.to_parquet(path)
        case "csv":
            table.to_csv(path)
        case "tsv":
            table.to_csv(path, sep="\t")
        case "folder":
            path.mkdir()
            table.to_json(path / "train.jsonl")
        case "saved":
            table.save_to_disk(path)
        case "gz":
            table.to_json(path, compression="gzip")
    assert texts(read(plain_tokenizer, name=str(path)), plain_tokenizer) == [
        ("<s>Q:", " so</s>", " no</s>"),
        ("<s>R:", " a</s>", " b</s>"),
    ]


def numbered(n: int, start: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"{start + i}:", "chosen": " so", "rejected": " no"} for i in range(n)]


def prompts(rows: Any, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(row["prompt"]).removeprefix("<s>").rstrip(":") for row in rows]


def test_held_out_rows_do_not_depend_on_what_is_dropped(write: Write, plain_tokenizer: Any) -> None:
    rows = numbered(20)
    loaded = read(plain_tokenizer, name=write(*rows), eval_size=5, seed=3)
    held, left = prompts(loaded.eval, plain_tokenizer), prompts(loaded.train, plain_tokenizer)
    assert len(held) == 5 and sorted(map(int, held + left)) == list(range(20))
    assert (loaded.report.train_rows, loaded.report.eval_rows) == (15, 5)
    assert prompts(read(plain_tokenizer, name=write(*rows), eval_size=5, seed=3).eval, plain_tokenizer) == held
    assert prompts(read(plain_tokenizer, name=write(*rows), eval_size=5, seed=4).eval, plain_tokenizer) != held
    rows[int(held[0])]["rejected"] = " so"
    assert set(held[1:]) < set(prompts(read(plain_tokenizer, name=write(*rows), eval_size=5, seed=3).eval, plain_tokenizer))
    assert "leaves nothing to train on; 19 rows" in refused(plain_tokenizer, name=write(*rows), eval_size=19)


def test_a_separate_set_to_evaluate_on(tmp_path: Path, write: Write, plain_tokenizer: Any) -> None:
    write(*numbered(3), name="train.jsonl")
    write(*numbered(2, 10), name="test.jsonl")
    folder = read(plain_tokenizer, name=str(tmp_path), eval={"split": "test"}, limit=2)
    assert prompts(folder.train, plain_tokenizer) == ["0", "1"] and prompts(folder.eval, plain_tokenizer) == ["10", "11"]
    files = read(plain_tokenizer, name=f"{tmp_path}/train.jsonl", eval=f"{tmp_path}/test.jsonl")
    assert files.report.eval.outcomes == {"kept": 2} and files.report.eval_rows == 2
    assert "is trained on; give another split" in refused(plain_tokenizer, name=str(tmp_path), eval={})
    assert prompts(read(plain_tokenizer, name=str(tmp_path), split="train[:1]+test").train, plain_tokenizer) == [
        "0",
        "10",
        "11",
    ]


def test_mixture_weights(write: Write, plain_tokenizer: Any) -> None:
    first, second = write(*numbered(8), name="a.jsonl"), write(*numbered(4, 10), name="b.jsonl")
    sets = [{"name": first, "weight": 0.5}, {"name": second, "weight": 2.5}]
    loaded = read(plain_tokenizer, mixture=sets, eval_size=2)
    got = [int(number) for number in prompts(loaded.train, plain_tokenizer)]
    held = [int(number) for number in prompts(loaded.eval, plain_tokenizer)]
    small, large = [n for n in got if n < 10], [n for n in got if n >= 10]
    assert [part.read for part in loaded.report.train] == [4, 4]
    assert len(small) + sum(n < 10 for n in held) == 4 and len(set(small)) == len(small)
    assert len(large) == round(2.5 * (4 - sum(n >= 10 for n in held))) and not set(held) & set(got)


def test_streaming(write: Write, plain_tokenizer: Any) -> None:
    rows = [*numbered(4), {"prompt": "x", "chosen": "y", "rejected": "y"}, *numbered(2, 4)]
    loaded = read(plain_tokenizer, name=write(*rows), streaming=True, eval_size=2, shuffle_buffer=0)
    assert "first 7 rows of the stream, 6 kept, 1 dropped (identical 1)" in str(loaded.report)
    assert prompts(loaded.eval, plain_tokenizer) == ["0", "1"]
    live = loaded.report.live[0]
    before = live.read
    assert prompts(loaded.train, plain_tokenizer) == ["2", "3", "4", "5"]
    assert live.read - before == 7
    shuffled = read(plain_tokenizer, name=write(*rows), streaming=True)
    assert sorted(prompts(shuffled.train, plain_tokenizer)) == [str(i) for i in range(6)]
    both = read(
        plain_tokenizer, mixture=[{"name": write(*rows)}, {"name": write(*numbered(9, 20), name="b.jsonl")}], streaming=True
    )
    assert set(prompts(both.train, plain_tokenizer)) >= {str(i) for i in [*range(6), *range(20, 29)]}
    assert all(live.read > 0 for live in both.report.live)
    late = [*numbered(70), {"prompt": "x", "chosen": "y", "rejected": "y"}]
    stream = read(plain_tokenizer, name=write(*late), streaming=True, identical="error").train
    with pytest.raises(UserError, match="identical, the first is row 71"):
        list(stream)


def test_tokenised_rows_are_cached(write: Write, plain_tokenizer: Any) -> None:
    path = write(*numbered(3))
    first = read(plain_tokenizer, name=path).train.cache_files
    assert first and read(plain_tokenizer, name=path, eval_size=1, seed=1).train.cache_files == first
    assert read(plain_tokenizer, name=path, max_length=99).train.cache_files != first


def test_several_processes_tokenise_alike(write: Write, plain_tokenizer: Any) -> None:
    path = write(*numbered(5))
    assert read(plain_tokenizer, name=path, num_proc=2).train[:] == read(plain_tokenizer, name=path).train[:]


def test_columns_can_be_named(write: Write, plain_tokenizer: Any) -> None:
    path = write({"ask": "Q:", "good": " so", "bad": " no"})
    loaded = read(plain_tokenizer, name=path, columns={"prompt": "ask", "chosen": "good", "rejected": "bad"})
    assert texts(loaded, plain_tokenizer) == [("<s>Q:", " so</s>", " no</s>")]
    assert "prompt <- ask, chosen <- good, rejected <- bad" in str(loaded.report)
