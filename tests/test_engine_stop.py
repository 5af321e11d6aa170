"""Stop strings: where a completion is cut, alike by all engines, and that nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_engine_hf import EOS, PAD, PROMPTS, trained
from test_engine_server import Served, engine, serving
from torch import nn

from posttrain.engines.file import FileEngine
from posttrain.engines.hf import HFEngine
from posttrain.engines.rollout import Rollout, text_of
from posttrain.engines.stop import Stop
from posttrain.sample import load_sample_run
from posttrain.schema import UserError, parse
from posttrain.settings import SamplingConfig

HUMAN = "\n\nHuman:"


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("text", "strings", "remains"),
    [
        (f"ab yes{HUMAN} no", [HUMAN], "ab yes"),
        (f"ab{HUMAN} a{HUMAN}", [HUMAN], "ab"),
        (f"ab yes{HUMAN}", ["\n\nAssistant:", HUMAN], "ab yes"),
        ("ab yes no", [" no", " yes"], "ab"),
        ("ab yes no", ["es"], "ab"),
        ("ab éa no", ["a no"], "ab é"),
        ("ab éa", ["é"], "ab "),
        (HUMAN, [HUMAN], ""),
        ("ab yes", ["ab"], ""),
        ("ab\n\nHuman", [HUMAN], None),
        ("", [HUMAN], None),
        ("ab yes", [], None),
    ],
)
def test_what_lies_wholly_before_the_first_string_remains(
    tokenizer: Any, text: str, strings: list[str], remains: str | None
) -> None:
    """` yes` is one token, `é` two."""
    tokens, stop = ids(tokenizer, text), Stop(strings, tokenizer)
    sampled = Rollout([1, 20], [*tokens, tokenizer.eos_token_id], [-0.5] * (len(tokens) + 1), False, 3, 7)
    got = stop.cut(sampled)
    if remains is None:
        assert got == sampled
        return
    kept = ids(tokenizer, remains)
    assert got == Rollout([1, 20], kept, [-0.5] * len(kept), True, 3, 7) and text_of(got, tokenizer) == remains
    whole = [count for count in range(len(tokens) + 1) if stop.reached([1, 20], tokens[:count])]
    assert whole[0] == min(count for count in range(len(tokens) + 1) if stop.kept([1, 20], tokens[:count]) is not None)


def test_a_string_that_begins_in_the_prompt_is_none_of_the_completion(tokenizer: Any) -> None:
    stop = Stop(["ab yes"], tokenizer)
    assert stop.kept(ids(tokenizer, "ab"), ids(tokenizer, " yes")) is None
    assert not stop.reached(ids(tokenizer, "ab"), ids(tokenizer, " yes"))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return trained(vocab_size=267)


def test_the_model_samples_the_same_and_ends_earlier(model: nn.Module, tokenizer: Any) -> None:
    """Against the cut of what it samples without strings; forwards are counted where all rows come to one."""
    settings = {"ends": (EOS,), "pad": PAD, "tokenizer": tokenizer}
    free = HFEngine(model, SamplingConfig(max_new_tokens=12), **settings).generate(PROMPTS, 4)
    strings = sorted({text_of(one, tokenizer)[3:5] for one in free} | {text_of(free[0], tokenizer)[0]})
    stopped = HFEngine(model, SamplingConfig(max_new_tokens=12, stop=tuple(strings)), **settings).generate(PROMPTS, 4)
    expected = [Stop(strings, tokenizer).cut(one) for one in free]
    assert [one.completion for one in stopped] == [one.completion for one in expected]
    assert [one.finished for one in stopped] == [one.finished for one in expected]
    for one, other in zip(stopped, expected, strict=True):
        assert one.logps == pytest.approx(other.logps, abs=1e-5)
    assert stopped[0].completion == [] and max(len(one.completion) for one in stopped) > 1
    calls = []
    hook = model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    HFEngine(model, SamplingConfig(max_new_tokens=12, stop=tuple(strings)), **settings).generate(PROMPTS, 1)
    hook.remove()
    assert len(calls) < 12


def test_a_server_is_asked_to_stop_and_its_answer_is_cut(tokenizer: Any) -> None:
    """It counts up from the prompt's last token, here the letters y, z and the end token."""
    y, z = ids(tokenizer, "y")[0], ids(tokenizer, "z")[0]
    with serving(Served()) as served:
        one = engine(served, stop=("z",), tokenizer=tokenizer)
        assert one.generate([[1, y], [1, z]]) == [
            Rollout([1, y], [y], [-0.5], True, 0, 0),
            Rollout([1, z], [], [], True, 1, 0),
        ]
        bodies = [body for path, body in served.asked if path == "/v1/completions"]
        assert all(body["stop"] == ["z"] for body in bodies)
    assert z == y + 1


def test_what_was_sampled_before_is_cut(write: Callable[..., str], tokenizer: Any) -> None:
    tokens = ids(tokenizer, "ab yes")
    path = write({"prompt_ids": [1, 2], "completion_ids": [tokens, []], "logps": [[-1.0, -2.0], []], "finished": [False, True]})
    got = FileEngine(path, tokenizer, ["ye"]).generate([[1, 2]], 2)
    assert got == [Rollout([1, 2], tokens[:1], [-1.0], True, 0, 0), Rollout([1, 2], [], [], True, 0, 0)]


def test_the_setting(tmp_path: Path) -> None:
    """One string or a list; on the command line YAML, whose double quotes know line breaks."""
    assert parse(SamplingConfig, {"stop": HUMAN}, "sampling").stop == (HUMAN,)
    assert SamplingConfig().stop is None
    words = ["model=M", "data=D", f"output={tmp_path / 'o'}"]
    for word in (r'stop=["\n\nHuman:", "b"]', r'sampling.stop=["\n\nHuman:", "b"]'):
        assert load_sample_run(None, [*words, word]).sampling.stop == (HUMAN, "b")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('sampling: {stop: ["\\n\\nHuman:"]}\n')
    run = load_sample_run(recipe, words)
    assert run.sampling.stop == (HUMAN,) and json.loads(json.dumps(run.identity()))["sampling"]["stop"] == [HUMAN]
    with pytest.raises(UserError, match=r"sampling: stop\.\S* = '': String should have at least 1 character"):
        parse(SamplingConfig, {"stop": ["a", ""]}, "sampling")
