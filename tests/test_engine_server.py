"""The client of a vLLM server, against a server of this file that answers as vLLM 0.32 does and can be broken at will."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import JsonHandler, JsonServer, serving
from transformers import LlamaConfig

from posttrain.engines import build, worker
from posttrain.engines.client import EngineError
from posttrain.engines.rollout import Rollout, derived
from posttrain.engines.server import ServerEngine
from posttrain.schema import UserError
from posttrain.settings import EngineConfig, ModelConfig, SamplingConfig

EOS = 2


class Served(JsonServer):
    """A model whose completions are its prompt's last token, counted up from the weights' number, then the end token."""

    def __init__(self) -> None:
        super().__init__(Handler)
        self.label, self.weights, self.processed, self.development = "default", 0, True, True
        self.extended = True
        self.asked: list[tuple[str, Any]] = []
        self.trouble: list[Any] = []
        """What to do with the next completions in place of an answer: a status, `hang`, `drop` or `restart`."""

    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        first = body["prompt"][-1] + self.weights
        ids = [[first + index, first + index + 1, EOS][: body["max_tokens"]] for index in range(body.get("n", 1))]
        scale = body["temperature"] if self.processed else 1.0
        logprobs = [
            {"token_logprobs": [-0.5 / scale] * len(one), "top_logprobs": [{"a": -0.5 / scale, "b": -9.0}] * len(one)}
            for one in ids
        ]
        reasons = ["stop" if one[-1] == EOS else "length" for one in ids]
        choices = zip(range(len(ids)), ids, logprobs, reasons, strict=True)
        names = ("index", "token_ids", "logprobs", "finish_reason")
        return {"choices": [dict(zip(names, one, strict=True)) for one in choices][::-1]}


class Handler(JsonHandler):
    server: Served

    def do_GET(self) -> None:
        server = self.server
        server.asked.append((self.path, None))
        if self.path == "/v1/models":
            self.answer({"data": [{"id": "tiny", "max_model_len": 32}]})
        elif self.path == "/weight_info" and server.development:
            self.answer({"weight_version": server.label})
        else:
            self.answer({"error": {"message": "Not Found"}}, 404)

    def do_POST(self) -> None:
        server, body = self.server, self.body()
        server.asked.append((self.path, body))
        if self.path == "/v1/completions":
            trouble = server.trouble.pop(0) if server.trouble else None
            if trouble == "hang":
                time.sleep(1)
            if trouble in ("hang", "drop"):
                self.close_connection = True
                return
            if isinstance(trouble, int):
                self.answer({"error": {"message": "the engine core is dead"}}, trouble)
                return
            if trouble == "restart":
                server.label, server.weights = "default", 0
            self.answer(server.complete(body))
        elif not server.development:
            self.answer({"error": {"message": "Not Found"}}, 404)
        elif self.path == "/collective_rpc":
            if body["method"] == worker.REFRESH and not server.extended:
                self.answer({"error": {"message": "no such method"}}, 500)
                return
            if body["method"] == "reload_weights":
                server.weights = int(Path(body["kwargs"]["weights_path"], "weights").read_text())
            self.answer({"results": [None]})
        elif self.path == "/reset_prefix_cache":
            self.answer({"success": True})
        elif self.path == "/update_weight_version":
            server.label = body["new_version"]
            self.answer({"success": True})


@pytest.fixture
def server() -> Iterator[Served]:
    with serving(Served()) as served:
        yield served


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib3.util.retry.Retry.sleep", lambda self, response=None: None)


class Policy:
    """Weights that are one number."""

    def __init__(self, tied: bool = False) -> None:
        self.weights, self.exports, self.tied = 0, 0, tied

    def export(self, folder: Path) -> None:
        LlamaConfig(tie_word_embeddings=self.tied).save_pretrained(folder)
        (folder / "weights").write_text(str(self.weights))
        self.exports += 1


def engine(server: Served, tmp_path: Path | None = None, policy: Policy | None = None, **settings: Any) -> ServerEngine:
    client = {name: settings.pop(name) for name in ("timeout", "retries", "tokenizer") if name in settings}
    sampling = SamplingConfig(**{"max_new_tokens": 4, **settings})
    folder = None if tmp_path is None else tmp_path / "weights"
    export = None if policy is None else policy.export
    return ServerEngine(server.url, sampling, ends=[EOS], export=export, folder=folder, **client)


def test_rollouts_come_grouped_with_their_log_probs(server: Served) -> None:
    got = engine(server).generate([[1, 10], [1, 20, 30]], 2, seeds=[7, 8])
    assert got == [
        Rollout([1, 10], [10, 11, EOS], [-0.5] * 3, True, 0, 0),
        Rollout([1, 10], [11, 12, EOS], [-0.5] * 3, True, 0, 0),
        Rollout([1, 20, 30], [30, 31, EOS], [-0.5] * 3, True, 1, 0),
        Rollout([1, 20, 30], [31, 32, EOS], [-0.5] * 3, True, 1, 0),
    ]
    bodies = [body for path, body in server.asked if path == "/v1/completions"]
    assert sorted((tuple(body["prompt"]), body["seed"]) for body in bodies) == [((1, 10), 7), ((1, 20, 30), 8)]
    asked = {"n": 2, "max_tokens": 4, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert {key: bodies[0][key] for key in asked} == asked
    assert (bodies[0]["stop_token_ids"], bodies[0]["ignore_eos"], bodies[0]["return_token_ids"]) == ([EOS], False, True)
    cut_short = engine(server, max_new_tokens=2).generate([[1, 10]])
    assert [(one.completion, one.finished) for one in cut_short] == [([10, 11], False)]
    assert engine(server).generate([]) == []


def test_seeds_come_from_version_and_position(server: Served) -> None:
    engine(server, seed=3).generate([[1], [1]])
    seeds = {body["seed"] for path, body in server.asked if path == "/v1/completions"}
    assert seeds == {derived(3, 0, 0), derived(3, 0, 1)}


def test_weights_are_brought_over_once_a_version(server: Served, tmp_path: Path) -> None:
    policy = Policy()
    one = engine(server, tmp_path, policy)
    for version, weights in ((0, 100), (1, 200)):
        policy.weights = weights
        one.sync(version)
        one.sync(version)
        (got,) = one.generate([[1, 10]])
        assert (got.completion[0], got.version) == (10 + weights, version)
    assert policy.exports == 2
    assert server.paths().count("/collective_rpc") == server.paths().count("/reset_prefix_cache") == 2


def test_a_restarted_server_gets_the_policy_before_it_samples(server: Served, tmp_path: Path) -> None:
    policy = Policy()
    policy.weights = 100
    one = engine(server, tmp_path, policy)
    one.sync(5)
    server.label, server.weights = "default", 0
    assert one.generate([[1, 10]])[0].completion == [110, 111, EOS]
    assert policy.exports == 1
    server.trouble = ["restart"]  # while it samples: the answer, from its first weights, is thrown away
    assert one.generate([[1, 10]])[0].completion == [110, 111, EOS]
    other = engine(server, tmp_path, policy)
    other.sync(5)  # another run's engine on the same server, at the same version
    assert not one._holds_policy()
    server.trouble = ["restart"] * 3
    with pytest.raises(EngineError, match="lost its weights 3 times in one call"):
        one.generate([[1, 10]])


@pytest.mark.parametrize("trouble", [[503], [500, 502], ["drop"] * 4, ["hang"], ["drop", "hang", "drop"], ["hang", 503, 503]])
def test_what_passes_is_waited_for(server: Served, trouble: list[Any]) -> None:
    one = engine(server, timeout=0.5, retries=4)
    server.trouble = list(trouble)
    assert one.generate([[1, 10]])[0].completion == [10, 11, EOS]


def test_what_does_not_pass_ends_in_one_error(server: Served) -> None:
    one = engine(server, timeout=0.3, retries=3)
    server.trouble = ["hang"] * 9
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"POST http://127.0.0.1:\d+/v1/completions: no answer .* Read timed out") as error:
        one.generate([[1, 10]])
    assert time.monotonic() - began < 2, "a hanging server is asked twice, not as often as one that refuses"
    assert "\n" not in str(error.value)
    server.trouble = [503] * 9
    with pytest.raises(EngineError, match="status 503: the engine core is dead"):
        one.generate([[1, 10]])
    server.trouble = [400]
    with pytest.raises(EngineError, match="status 400: the engine core is dead"):
        one.generate([[1, 10]])
    assert server.trouble == []


def test_a_server_that_is_not_there(server: Served) -> None:
    url = server.url
    server.server_close()
    with pytest.raises(
        EngineError, match=r"GET .*/v1/models: no answer after .* 2 retries: .*refused.*; start it: VLLM_SERVER_DEV"
    ):
        ServerEngine(url, SamplingConfig(), ends=[EOS], retries=2)


def test_a_server_in_production_mode_cannot_be_synchronised(server: Served, tmp_path: Path) -> None:
    one = engine(server, tmp_path, Policy())
    one.sync(0)
    server.development = False
    with pytest.raises(EngineError, match=r"GET .*/weight_info: status 404: Not Found; .* VLLM_SERVER_DEV_MODE=1 vllm serve"):
        one.generate([[1]])
    with pytest.raises(EngineError, match=r"POST .*/collective_rpc: status 404: Not Found; the server has to read .*weights"):
        one.sync(1)


def test_log_probs_before_temperature_are_refused(server: Served) -> None:
    assert math.isclose(engine(server, temperature=0.5).generate([[1]])[0].logps[0], -1.0)
    server.processed = False
    engine(server)
    engine(server, temperature=0.0)
    for settings in ({"temperature": 0.5}, {"top_p": 0.9}):
        with pytest.raises(UserError, match="start it with --logprobs-mode processed_logprobs"):
            engine(server, **settings)


def test_prompts_beyond_the_servers_length(server: Served) -> None:
    with pytest.raises(UserError, match=r"prompt 1 of 1 has 30 tokens, which with max_new_tokens = 4 is more than .* 32"):
        engine(server).generate([[1] * 30])


@pytest.mark.parametrize(("tied", "extended", "asked"), [(False, True, 0), (True, True, 2), (True, False, 1)])
def test_a_tied_head_is_renewed(
    server: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture, tied: bool, extended: bool, asked: int
) -> None:
    """Where the server cannot, it says once how it could."""
    server.extended = extended
    one = engine(server, tmp_path, Policy(tied))
    one.sync(1)
    one.sync(2)
    called = [body["method"] for path, body in server.asked if path == "/collective_rpc"]
    assert called.count("reload_weights") == 2 and called.count(worker.REFRESH) == asked
    warned = [one.message for one in caplog.records if worker.NAME in one.message]
    assert len(warned) == (tied and not extended), warned


def test_on_a_cpu_prompts_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of a prompt is fatal to vLLM's seeded requests there; what the user says counts before that."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    settings = ModelConfig(name="m", dtype="float32")
    assert build._options(EngineConfig(kind="vllm"), settings)["enable_chunked_prefill"] is False
    asked = EngineConfig(kind="vllm", options={"enable_chunked_prefill": True, "max_model_len": 64})
    assert build._options(asked, settings).items() >= asked.options.items()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert "enable_chunked_prefill" not in build._options(EngineConfig(kind="vllm"), settings)
