"""Scorers and preferences: their values, and what is said of one that cannot be used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_tokenizer
from tiny_models import saved
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from posttrain.rewards.build import SCORERS, preference, scorer
from posttrain.rewards.judges import CONTEST, PairPreference, RewardModel
from posttrain.rewards.rules import final_number
from posttrain.rewards.scorer import Preference, Scorer, bradley_terry, mean_wins
from posttrain.schema import UserError


def scores(settings: Any, completions: Sequence[str], rows: Sequence[dict[str, Any]] | None = None) -> list[float]:
    rows = [{}] * len(completions) if rows is None else rows
    return scorer(settings)(["what? "] * len(completions), completions, rows)


def test_length() -> None:
    assert scores("length", ["a bc", ""]) == [2, 0]
    assert scores({"name": "length", "unit": "characters", "target": 3}, ["abcd", "abc", ""]) == [-1, 0, -3]


def test_regex_and_format() -> None:
    assert scores({"name": "regex", "pattern": "yes.*no"}, ["well, yes\nand no", "no, yes"]) == [1, 0]
    assert scores({"name": "regex", "pattern": r"\d+", "whole": True}, [" 12\n", "12 a"]) == [1, 0]
    good = "<think>so\nit is</think>\n<answer>4</answer>"
    wrong = [f"well {good}", good.replace("<think>", ""), f"{good}{good}", good + "<answer>5</answer>"]
    assert scores("format", [good, *wrong]) == [1, 0, 0, 0, 0]
    with pytest.raises(UserError, match=r"reward.pattern = '\(' is no regular expression"):
        scores({"name": "regex", "pattern": "("}, ["a"])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7.", 7),
        ("#### 1,234", 1234),
        ("it costs $12.50", 12.5),
        ("#### 5 of 8", 5),
        ("#### 3\n#### -2", -2),
        ("from 2 to -3", -3),
        ("none", None),
        ("", None),
    ],
)
def test_final_numbers(text: str, number: float | None) -> None:
    assert final_number(text) == number


def test_answers_like_those_of_gsm8k() -> None:
    rows = [{"answer": "She sold 48/2 = 24.\n#### 72"}] * 4
    assert scores("answer", ["so it is 72", "#### 72.0 clips", "72, or 73", "many"], rows) == [1, 1, 0, 0]
    assert scores({"name": "answer", "marked": True}, ["so it is 72", "#### 72"], rows[:2]) == [0, 1]
    assert scores({"name": "answer", "column": "key"}, ["1,000"], [{"key": 1000}]) == [1]
    with pytest.raises(UserError, match="no column 'key'; columns: answer"):
        scores({"name": "answer", "column": "key"}, ["1"], [{"answer": "1"}])
    with pytest.raises(UserError, match=r"reward answer: row 2 \('2'\): raises ValueError: column 'answer' holds no number"):
        scores("answer", ["1", "2"], [{"answer": "1"}, {"answer": "one"}])


def test_vader() -> None:
    pytest.importorskip("vaderSentiment")
    good, bad, neither = scores("vader", ["I love it, it is great!", "This is horrible and sad.", "It is a table."])
    assert (good, bad, neither) == (pytest.approx(0.8622, abs=1e-3), pytest.approx(-0.7650, abs=1e-3), 0)
    together = scorer({"name": "vader", "with_prompt": True})
    asked = [{"role": "user", "content": "I love it"}]
    assert together(["I love it, ", asked], ["a table", "a table"], [{}, {}])[1] > 0.5


def shout(
    prompts: Sequence[str], completions: Sequence[str], rows: Sequence[dict[str, Any]], *, scale: float = 1
) -> list[float]:
    """A scorer of a user."""
    return [scale * text.count("!") for text in completions]


def test_functions_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    assert scores({"name": "test_rewards:shout", "scale": 2}, ["a!", "!!"]) == [2, 4]
    for name, message in (
        ("nothing_like_it:f", "nothing_like_it cannot be imported"),
        ("test_rewards:shoot", "test_rewards has no function 'shoot'; did you mean shout?"),
        ("lenth", "reward.name = 'lenth'; did you mean length? Possible: length, regex"),
    ):
        with pytest.raises(UserError) as error:
            scorer(name)
        assert message in str(error.value)
    with pytest.raises(UserError, match=r"reward: unknown key 'aim'. Possible: unit, target"):
        scorer({"name": "length", "aim": 3})
    with pytest.raises(UserError, match="name is required; possible: length"):
        scorer({"target": 3})


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda p, c, r: [1.0, math.nan, 2.0], "reward mine: row 2 ('bb'): the score is nan; a finite number is expected"),
        (lambda p, c, r: [1.0, 1.0, -math.inf], "reward mine: row 3 ('ccc'): the score is -inf"),
        (lambda p, c, r: [1.0, None, 2.0], "reward mine: row 2 ('bb'): None is no number"),
        (lambda p, c, r: [1.0], "reward mine: 1 scores for 3 completions, at odds at row 2 ('bb')"),
        (lambda p, c, r: [1.0] * 4, "reward mine: 4 scores for 3 completions, at odds at row 3"),
        (
            lambda p, c, r: [1 / (3 - len(text)) for text in c],
            "reward mine: row 3 ('ccc'): raises ZeroDivisionError: division by zero",
        ),
        (lambda p, c, r: [{}[0]] if len(c) > 1 else [0.0], "raises KeyError: 0, of 3 rows together and of none alone"),
    ],
)
def test_scores_that_cannot_be_used_are_named(score: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        Scorer("mine", score)(["p"] * 3, ["a", "bb", "ccc"], [{}] * 3)
    assert message in str(error.value)


def test_scores_of_tensors_and_of_nothing() -> None:
    assert Scorer("mine", lambda p, c, r: torch.tensor([1.5, 2.0]))(["p"] * 2, ["a", "b"], [{}] * 2) == [1.5, 2.0]
    assert Scorer("mine", lambda p, c, r: 1 / 0)([], [], []) == []


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny causal LM with its tokenizer."""
    return str(saved(tmp_path_factory.mktemp("judge"), initializer_range=0.3, max_position_embeddings=512))


def classifier(folder: Path, labels: int) -> str:
    """A tiny sequence classification model with its tokenizer."""
    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=labels, initializer_range=0.3, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_reward_model_reads_the_last_token(tmp_path: Path) -> None:
    name = classifier(tmp_path, 1)
    network, tokenizer = AutoModelForSequenceClassification.from_pretrained(name), tiny_tokenizer()
    prompts = ["what? ", "a", [{"role": "user", "content": "say"}]]
    completions = ["ab yes and no", "b", "ab"]
    texts = [tokenizer("what? ab yes and no")["input_ids"], tokenizer("ab")["input_ids"]]
    chat = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "ab"}]
    texts.append(tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"])
    with torch.no_grad():
        expected = [float(network(torch.tensor([ids])).logits) for ids in texts]
    assert len({round(value, 3) for value in expected}) == 3
    for size in (1, 2, 16):
        got = scorer({"name": "model", "model": name, "batch_size": size})(prompts, completions, [{}] * 3)
        assert got == pytest.approx(expected, abs=1e-5)
    rendered = scorer({"name": "model", "model": name, "format": "chat"})(["say"], ["ab"], [{}])
    assert rendered == pytest.approx(expected[2:], abs=1e-5)


def test_a_reward_model_reads_the_end_of_what_is_too_long(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = RewardModel(model=classifier(tmp_path, 1), max_length=8)
    with caplog.at_level("INFO", "posttrain"):
        long, tail = model(["<s>abcdefghijklm", "ghijklm"], ["no", "no"], [{}, {}])
    assert "1 of 2 texts are longer than max_length = 8" in caplog.text or "2 of 2" in caplog.text
    ids = tiny_tokenizer()("<s>abcdefghijklmno")["input_ids"][-8:]
    with torch.no_grad():
        assert long == pytest.approx(float(model.network(torch.tensor([ids])).logits), abs=1e-5)
    assert math.isfinite(tail)


def test_log_odds_of_a_label(tmp_path: Path) -> None:
    name = classifier(tmp_path, 3)
    network, ids = AutoModelForSequenceClassification.from_pretrained(name), tiny_tokenizer()("what? no")["input_ids"]
    with torch.no_grad():
        p = float(network(torch.tensor([ids])).logits.softmax(-1)[0, 2])
    assert scores({"name": "model", "model": name, "label": 2}, ["no"]) == pytest.approx([math.log(p / (1 - p))], abs=1e-5)
    for label in (None, 3):
        with pytest.raises(UserError, match=r"has 3 labels: 0 \(LABEL_0\), .* choose one of several, none of one"):
            scores({"name": "model", "model": name, "label": label}, ["no"])
    with pytest.raises(UserError, match="folder /nowhere does not exist"):
        scores({"name": "model", "model": "/nowhere"}, ["no"])


def test_a_model_that_compares(judge: str) -> None:
    tokenizer, network = tiny_tokenizer(), AutoModelForCausalLM.from_pretrained(judge)
    prompts = [
        "hi",
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "{b}"}, {"role": "user", "content": "so"}],
    ]
    a, b = ["ab", "{a} yes"], ["no", "b"]
    contexts = ["\n\n<turn> user\n hi\n\n\n", "\n\n<turn> user\n hi\n\n<turn> assistant\n {b}\n\n<turn> user\n so\n\n\n"]

    def asked(context: str, one: str, other: str) -> float:
        text = f"[CONTEXT] {context} [RESPONSE A] {one} [RESPONSE B] {other} \n"
        ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], return_dict=True)["input_ids"]
        with torch.no_grad():
            logits = network(torch.tensor([ids])).logits[0, -1]
        tokens = [tokenizer.convert_tokens_to_ids(letter) for letter in "AB"]
        return float(logits[tokens].softmax(-1)[0])

    expected = [(asked(c, x, y) + 1 - asked(c, y, x)) / 2 for c, x, y in zip(contexts, a, b, strict=True)]
    assert abs(asked(contexts[0], "ab", "no") + asked(contexts[0], "no", "ab") - 1) > 1e-3, "it leans to a place"
    for size in (1, 3, 16):
        compare = preference({"name": "pairs", "model": judge, "batch_size": size})
        assert compare(prompts, a, b) == pytest.approx(expected, abs=1e-5)
        assert compare(prompts, b, a) == pytest.approx([1 - p for p in expected], abs=1e-5)
    with pytest.raises(UserError, match=r"'yes no' is . tokens"):
        PairPreference(model=judge, answers=("A", "yes no"))(["hi"], ["a"], ["b"])
    assert CONTEST.count("{") == 3


def test_preferences_of_scores_and_scores_of_preferences() -> None:
    prefer = preference("length")
    assert isinstance(prefer, Preference)
    longer = prefer(["p"] * 3, ["a b c", "a", "a " * 2000], ["a", "a", "a"])
    assert longer == pytest.approx([1 / (1 + math.exp(-2)), 0.5, 1.0])
    answered = bradley_terry(scorer("answer"), rows=[{"answer": 3}])
    assert answered(["p"], ["3"], ["4"]) == pytest.approx([1 / (1 + math.exp(-1))])
    wins = mean_wins(prefer, "p", ["a", "a b", "a b c"])
    first, second = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2))
    assert wins == pytest.approx([((1 - first) + (1 - second)) / 2, 0.5, (second + first) / 2])
    with pytest.raises(UserError, match=r"preference mine: row 1 \('a'\): 1.5 is no probability"):
        Preference("mine", lambda p, a, b: [1.5] * len(p))(["p"], ["a"], ["b"])


def test_every_scorer_is_described() -> None:
    for name, kind in SCORERS.items():
        assert kind.__doc__, name
