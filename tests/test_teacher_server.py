"""A served teacher, against a server of this process that answers in the form of vLLM 0.32 and can be broken.

vLLM itself is not started here (tests/test_vllm.py does that where it is installed). What is taken from its source: the first
position is null; at each other one the prompt's own token comes first, then the k likeliest by rank, by id as text, once each;
-inf is written as -9999; errors are {"error": {"message": ...}}; k beyond --max-logprobs is refused with status 400.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from serving import JsonHandler, JsonServer, serving
from tiny import tiny_tokenizer
from tiny_models import tiny

from posttrain.engines.client import EngineError
from posttrain.reference import sequence_key
from posttrain.schema import UserError
from posttrain.teacher_cache import CachedTeacher
from posttrain.teacher_server import KEY, ServedTeacher

ROLES = ["completion"]
TOKENIZER = tiny_tokenizer()
SIZE = len(TOKENIZER)
K = 4


class Served(JsonServer):
    """A tiny model behind the protocol, cut to the tokens of its tokenizer."""

    def __init__(self, model: Any = None) -> None:
        super().__init__(Handler)
        self.model = model or tiny("llama", vocab_size=SIZE, seed=1)
        self.asked: list[tuple[str, Any, str | None]] = []
        self.trouble: list[Any] = []
        """What to do with the next completions in place of an answer: a status, `hang`, `drop`, or bytes to answer."""
        self.dies_after: int | None = None
        self.max_logprobs, self.tokenizes, self.key = 20, True, None
        self.change: Any = lambda told: told

    def completions(self) -> int:
        return sum(path == "/v1/completions" for path, _, _ in self.asked)

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        ids, k = body["prompt"], body["prompt_logprobs"]
        with torch.no_grad():
            logps = self.model(input_ids=torch.tensor([ids])).logits[0, :, :SIZE].log_softmax(-1)
        told: list[Any] = [None]
        for at, token in enumerate(ids[1:]):
            best = logps[at].topk(k).indices.tolist()
            own = int((logps[at] > logps[at, token]).sum()) + 1
            ranked = {token: own} | {id: rank for rank, id in enumerate(best, start=1)}
            told.append(
                {
                    str(id): {
                        "logprob": max(logps[at, id].item(), -9999.0),
                        "rank": rank,
                        "decoded_token": TOKENIZER.decode([id]),
                    }
                    for id, rank in ranked.items()
                }
            )
        choice = {"index": 0, "text": "a", "logprobs": None, "finish_reason": "length", "prompt_logprobs": self.change(told)}
        return {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": [choice]}


class Handler(JsonHandler):
    server: Served

    def refused(self, body: Any) -> bool:
        """Count what is asked; True where the key is not right."""
        server, given = self.server, self.headers["Authorization"]
        server.asked.append((self.path, body, given))
        if server.key is None or given == f"Bearer {server.key}":
            return False
        self.answer({"error": {"message": f"Unauthorized: {given}"}}, 401)
        return True

    def do_GET(self) -> None:
        if not self.refused(None):
            self.answer(
                {"object": "list", "data": [{"id": "big", "object": "model", "root": "/models/big", "max_model_len": 64}]}
            )

    def do_POST(self) -> None:
        server, body = self.server, self.body()
        if self.refused(body):
            return
        if self.path == "/tokenize" and server.tokenizes:
            tokens = TOKENIZER.encode(body["prompt"], add_special_tokens=body["add_special_tokens"])
            self.answer({"count": len(tokens), "max_model_len": 64, "tokens": tokens, "token_strs": None})
        elif self.path != "/v1/completions":
            self.answer({"detail": "Not Found"}, 404)
        elif server.dies_after is not None and server.completions() > server.dies_after:
            self.close_connection = True  # no answer, and none to come
        else:
            self.complete(body)

    def complete(self, body: dict[str, Any]) -> None:
        trouble = self.server.trouble.pop(0) if self.server.trouble else None
        if trouble == "hang":
            time.sleep(1)
        if trouble in ("hang", "drop"):
            self.close_connection = True
        elif isinstance(trouble, int):
            self.answer({"error": {"message": "EngineCore encountered an issue"}}, trouble)
        elif isinstance(trouble, bytes):
            self.answer(trouble)
        elif body["prompt_logprobs"] > self.server.max_logprobs:
            told = f"Requested prompt logprobs of {body['prompt_logprobs']}, which is greater than max allowed: 20"
            self.answer({"error": {"message": told, "type": "BadRequestError", "code": 400}}, 400)
        else:
            self.answer(self.server.complete(body))


@pytest.fixture
def server() -> Iterator[Served]:
    with serving(Served()) as served:
        yield served


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib3.util.retry.Retry.sleep", lambda self, response=None: None)


def teacher(server: Served, **settings: Any) -> ServedTeacher:
    return ServedTeacher(server.url, **({"model": None, "k": K, "size": SIZE, "retries": 2, "timeout": 30.0} | settings))


def rows(count: int = 5) -> list[dict[str, list]]:
    texts = [(f"ab {i}?", " yes" * (1 + i)) for i in range(count)]
    return [{"prompt": TOKENIZER(prompt).input_ids, "completion": [TOKENIZER(text).input_ids[1:]]} for prompt, text in texts]


def test_what_is_read_is_what_the_model_says(server: Served) -> None:
    asked = teacher(server)
    asked.check(rows(), ROLES, TOKENIZER)
    answers = dict(one for window in asked.answers(rows(), ROLES) for one in window)
    for row in rows():
        (completion,) = row["completion"]
        ids = torch.tensor([[*row["prompt"], *completion]])
        with torch.no_grad():
            logps = server.model(input_ids=ids).logits[0, len(row["prompt"]) - 1 : -1].log_softmax(-1)
        entry, (best, items) = answers[sequence_key(row["prompt"], completion)], logps.topk(K)
        assert np.array_equal(entry.ids, items.numpy()) and np.allclose(entry.logps, best.numpy(), atol=1e-6)
        assert np.allclose(entry.own, logps.gather(1, ids[0, len(row["prompt"]) :, None])[:, 0].numpy(), atol=1e-6)
    sent = [body for path, body, _ in server.asked if path == "/v1/completions"]
    row = rows()[0]
    expected = {"model": "big", "prompt": [*row["prompt"], *row["completion"][0]], "add_special_tokens": False}
    assert expected | {"prompt_logprobs": K, "max_tokens": 1} in sent and len(sent) == 5


def test_a_named_model_has_to_be_served(server: Served) -> None:
    with pytest.raises(UserError) as error:
        teacher(server, model="bigger").check(rows(), ROLES, TOKENIZER)
    assert str(error.value) == f"teacher.model: {server.url} does not serve 'bigger'; possible: big"


def test_a_row_that_is_too_long_for_the_server_is_refused(server: Served) -> None:
    with pytest.raises(
        UserError, match=r"takes 64 tokens with one more that is sampled, and a row has 64; --data.max_length 63"
    ):
        teacher(server).check([*rows(), {"prompt": [1] * 60, "completion": [[9] * 4]}], ROLES, TOKENIZER)


def test_another_tokenizer_is_refused(server: Served) -> None:
    other = tiny_tokenizer()
    other.add_tokens(["es"])
    with pytest.raises(UserError, match=r"^teacher: big at http\S+ has another tokenizer than the student: of .* from number"):
        teacher(server).check([{"prompt": [1, 70], "completion": [[other("es").input_ids[-1]]]}], ROLES, other)


def test_without_tokenize_it_is_said_that_nothing_was_compared(server: Served, caplog: pytest.LogCaptureFixture) -> None:
    server.tokenizes = False
    with caplog.at_level(logging.WARNING, "posttrain"):
        teacher(server).check(rows(), ROLES, TOKENIZER)
    assert [one.message for one in caplog.records] == [
        f"teacher: {server.url} has no /tokenize; its tokens are not compared with the student's"
    ]


@pytest.mark.parametrize("trouble", [[500], [503, 429], ["drop"], ["hang"]])
def test_it_is_asked_again(server: Served, trouble: list[Any]) -> None:
    row = rows()[0]
    whole = teacher(server).answer(row["prompt"], row["completion"][0])
    server.trouble = list(trouble)
    again = teacher(server, timeout=0.5 if trouble == ["hang"] else 30.0).answer(row["prompt"], row["completion"][0])
    assert np.array_equal(again.logps, whole.logps) and server.completions() == 2 + len(trouble)


_HINT = f"start it with: vllm serve MODEL --max-logprobs {K}; a key is read from ${KEY}"


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ([500] * 3, "POST {url}/v1/completions: status 500: EngineCore encountered an issue; "),
        (["hang"] * 2, "POST {url}/v1/completions: no answer after "),
        ([b"<html>"], "POST {url}/v1/completions: answers with something that is not JSON; "),
        ([b'{"choices": []}'], "{url}/v1/completions gives no prompt_logprobs as vLLM does (IndexError: "),
        (
            [b'{"choices": [{"prompt_logprobs": null}]}'],
            "{url}/v1/completions gives no prompt_logprobs as vLLM does (TypeError: ",
        ),
        ([b"[1, 2]"], "{url}/v1/completions gives no prompt_logprobs as vLLM does (TypeError: "),
    ],
)
def test_one_error_says_what_to_do(server: Served, trouble: list[Any], message: str) -> None:
    server.trouble = list(trouble)
    row = rows()[0]
    with pytest.raises(EngineError) as error:
        teacher(server, timeout=0.3 if "hang" in trouble else 30.0).answer(row["prompt"], row["completion"][0])
    said = str(error.value)
    assert said.startswith("teacher: " + message.format(url=server.url)) and said.endswith(_HINT) and "\n" not in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda told: told[:-1], "positions of"),
        (lambda told: [one and dict(list(one.items())[:2]) for one in told], "2 items of 4"),
        (lambda told: [one and {id: {"logprob": 1.5} for id in one} for one in told], "whose probabilities sum to 17.9"),
        (lambda told: [one and {id: {"logprob": None} for id in one} for one in told], "TypeError"),
        (lambda told: [one and {id: {"logprob": float("nan")} for id in one} for one in told], "sum to nan"),
        (lambda told: [one and {str(int(id) + 1000): v for id, v in one.items()} for one in told], f"of a student with {SIZE}"),
        (lambda told: [one and dict([*list(one.items())[1:], ("7", {"logprob": -50.0})]) for one in told], "KeyError"),
    ],
)
def test_what_vllm_would_not_say_is_refused(server: Served, change: Any, message: str) -> None:
    server.change = change
    with pytest.raises(EngineError, match="gives no prompt_logprobs as vLLM does") as error:
        teacher(server).answer([5, 6], [200, 201, 202])
    assert message in str(error.value)


def test_what_is_impossible_is_finite(server: Served) -> None:
    server.change = lambda told: [
        one and {id: {"logprob": 0.0 if i == 0 else -np.inf} for i, id in enumerate(one)} for one in told
    ]
    entry = teacher(server).answer([5, 6], [7])
    assert sorted(entry.logps[0].tolist()) == [-9999.0] * (K - 1) + [0.0] and np.isfinite(entry.own).all()


def test_more_items_than_the_server_gives(server: Served) -> None:
    with pytest.raises(EngineError) as error:
        teacher(server, k=21).answer([5, 6], [7])
    assert str(error.value) == (
        f"teacher: POST {server.url}/v1/completions: status 400: Requested prompt logprobs of 21, which is greater than max "
        f"allowed: 20; start it with: vllm serve MODEL --max-logprobs 21; a key is read from ${KEY}"
    )


def test_nobody_there() -> None:
    with pytest.raises(
        EngineError, match=r"^teacher: GET http://127.0.0.1:9/v1/models: no answer after 0 s and 2 retries: .*refused"
    ):
        ServedTeacher("http://127.0.0.1:9", model=None, k=K, size=SIZE, retries=2).check(rows(), ROLES, TOKENIZER)
    with pytest.raises(UserError, match=r"^teacher.url = 'localhost': expected http://host:port"):
        ServedTeacher("localhost", model=None, k=K, size=SIZE)


def test_the_key_is_sent_and_never_shown(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    server.key = "sesame"
    monkeypatch.setenv(KEY, "open")
    with pytest.raises(EngineError) as error:
        teacher(server).check(rows(), ROLES, TOKENIZER)
    assert "status 401: Unauthorized: Bearer ...; " in str(error.value) and "open" not in str(error.value)
    monkeypatch.setenv(KEY, "sesame")
    teacher(server).check(rows(), ROLES, TOKENIZER)


def test_a_server_that_dies_costs_one_window(server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers 20 of 30 rows: those of the windows before it died are on disk, and the next run asks for the others."""
    monkeypatch.setattr("posttrain.teacher_server._WINDOW", 16)
    many = [{"prompt": [5, i], "completion": [[6, 7]]} for i in range(30)]
    cache = CachedTeacher(tmp_path, k=K, size=SIZE, name="big")
    server.dies_after = 20
    with pytest.raises(EngineError, match="no answer after"):
        list(cache.keep(teacher(server).answers(many, ROLES)))
    cache.reload()
    assert len(cache) == 16
    server.dies_after, before = None, server.completions()
    list(cache.keep(teacher(server).answers(cache.missing(many, ROLES), ROLES)))
    cache.reload()
    assert len(cache) == 30 and server.completions() - before == 14
    whole = CachedTeacher(tmp_path / "whole", k=K, size=SIZE, name="big")
    list(whole.keep(teacher(server).answers(many, ROLES)))
    whole.reload()
    for row in many:
        one, other = (c.lookup(row["prompt"], row["completion"][0]) for c in (cache, whole))
        assert all(np.array_equal(one[name], other[name]) for name in one)
