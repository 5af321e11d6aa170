"""A teacher behind a vLLM server (`vllm serve`), over its OpenAI-compatible protocol with token ids in and out.

Each prompt with its completion is one request: POST /v1/completions with all the ids as `prompt`, `prompt_logprobs: k` (vLLM's
extension) and one token to sample, which is thrown away. The answer holds, for each id but the first, the log-probs of the k
likeliest items and of the id itself, by id: k entries, or k + 1. They are those of the model before any temperature, over all
rows of its output head. The server is started with

    vllm serve MODEL --max-logprobs K

since it gives 20 at most by itself. A key, where it wants one, is read from the environment variable POSTTRAIN_TEACHER_API_KEY.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from .engines.client import Client, EngineError
from .reference import sequence_key
from .schema import UserError
from .teacher_cache import FLOOR, Entry

log = logging.getLogger("posttrain")

KEY = "POSTTRAIN_TEACHER_API_KEY"
_PARALLEL = 32
_WINDOW = 4 * _PARALLEL
_COMPARED = 8
"""Rows whose text the server tokenises, to see that it reads tokens as the student does."""


class ServedTeacher:
    """A teacher at a URL.

    Args:
        url: such as http://localhost:8000.
        model: the name it is served by; None takes the first that the server lists.
        k: items of a token.
        size: rows of the student's output head; an item beyond is refused.
        timeout: seconds to wait for an answer.
        retries: see `Client`.
    """

    def __init__(self, url: str, *, model: str | None, k: int, size: int, timeout: float = 600.0, retries: int = 8) -> None:
        self._client = Client(
            url, timeout=timeout, retries=retries, connections=_PARALLEL, who="teacher", secret=os.environ.get(KEY)
        )
        self.k, self.size, self._asked, self._served = k, size, model, None

    @property
    def hint(self) -> str:
        """What the user can do when the server does not answer as it should."""
        return f"start it with: vllm serve MODEL --max-logprobs {self.k}; a key is read from ${KEY}"

    @property
    def model(self) -> str:
        """The name it is served by; the server is asked where none was given."""
        return self._asked or self.served["id"]

    @property
    def served(self) -> dict[str, Any]:
        """What the server lists of the model.

        Raises:
            UserError: it cannot be reached, or serves no model of that name.
        """
        if self._served is None:
            listed = self._client.call("GET", "/v1/models", hint=self.hint)
            try:
                by_name = {one["id"]: one for one in listed["data"]}
            except (KeyError, TypeError):
                raise EngineError(f"teacher: {self._client.url}/v1/models lists no models; {self.hint}") from None
            name = self._asked or next(iter(by_name), None)
            if name not in by_name:
                raise UserError(f"teacher.model: {self._client.url} does not serve {name!r}; possible: {', '.join(by_name)}")
            self._served = by_name[name]
        return self._served

    def check(self, rows: Sequence[dict[str, Any]], roles: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        """The server can read the rows, and reads tokens as the student does, as far as it tells.

        Raises:
            UserError: it cannot be reached, a row is too long for it, or it makes other tokens of the same text.
        """
        longest = self.served.get("max_model_len")
        most = max(len(row["prompt"]) + max(len(one) for role in roles for one in row[role]) for row in rows)
        if longest is not None and most >= longest:
            raise UserError(
                f"teacher: {self._client.url} takes {longest} tokens with one more that is sampled, and a row has {most}; "
                f"--data.max_length {longest - 1} fits"
            )
        for row in rows[:_COMPARED]:
            text = tokenizer.decode([*row["prompt"], *row[roles[0]][0]])
            body = {"model": self.model, "prompt": text, "add_special_tokens": False}
            try:
                theirs = self._client.call("POST", "/tokenize", body)["tokens"]
            except EngineError as error:
                if error.status not in (404, 405, 501):
                    raise
                log.warning("teacher: %s has no /tokenize; its tokens are not compared with the student's", self._client.url)
                return
            ours = tokenizer.encode(text, add_special_tokens=False)
            if theirs != ours:
                at = next(i for i, (x, y) in enumerate(itertools.zip_longest(ours, theirs)) if x != y)
                raise UserError(
                    f"teacher: {self.model} at {self._client.url} has another tokenizer than the student: of {text[:40]!r}... "
                    f"it makes other tokens from number {at + 1} on"
                )

    def answers(self, rows: Iterable[dict[str, Any]], roles: Sequence[str]) -> Iterator[list[tuple[bytes, Entry]]]:
        """What the teacher says of the completions of `rows`, in their order, by their addresses in a cache."""
        asked = ((row["prompt"], completion) for row in rows for role in roles for completion in row[role])
        with ThreadPoolExecutor(_PARALLEL) as pool:
            for window in _windows(asked):
                found = pool.map(lambda one: self.answer(*one), window)
                yield [(sequence_key(*one), entry) for one, entry in zip(window, found, strict=True)]

    def answer(self, prompt: Sequence[int], completion: Sequence[int]) -> Entry:
        """What the teacher says of one completion.

        Raises:
            EngineError: no answer, or one that is not vLLM's.
        """
        body = {
            "model": self.model,
            "prompt": [*prompt, *completion],
            "add_special_tokens": False,
            "prompt_logprobs": self.k,
            "max_tokens": 1,
        }
        answer = self._client.call("POST", "/v1/completions", body, hint=self.hint)
        try:
            told = answer["choices"][0]["prompt_logprobs"]
            if len(told) != len(body["prompt"]):
                raise ValueError(f"{len(told)} positions of {len(body['prompt'])}")
            positions = [self._position(one, token) for one, token in zip(told[len(prompt) :], completion, strict=True)]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise EngineError(
                f"teacher: {self._client.url}/v1/completions gives no prompt_logprobs as vLLM does ({type(error).__name__}: "
                f"{error}); {self.hint}"
            ) from None
        ids, logps, own = zip(*positions, strict=True)
        return Entry(ids=np.array(ids), logps=np.array(logps, dtype=np.float32), own=np.array(own, dtype=np.float32))

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _position(self, told: dict[str, dict[str, Any]], token: int) -> tuple[list[int], list[float], float]:
        """The k likeliest items, their log-probs, and that of `token`; vLLM writes -inf as -9999."""
        logps = {int(id): max(float(one["logprob"]), FLOOR) for id, one in told.items()}
        best = sorted(logps, key=lambda id: (-logps[id], id))[: self.k]
        if len(best) < self.k:
            raise ValueError(f"{len(best)} items of {self.k}")
        beyond = [id for id in best if not 0 <= id < self.size]
        if beyond:
            raise ValueError(f"item {beyond[0]} of a student with {self.size}")
        values = [logps[id] for id in best]
        mass = float(np.exp(values).sum())
        if not mass < 1.001:  # NaN, too
            raise ValueError(f"log-probs of {self.k} items whose probabilities sum to {mass:.3g}")
        return best, values, logps[token]


def _windows(asked: Iterator[tuple[list[int], list[int]]]) -> Iterator[list[tuple[list[int], list[int]]]]:
    """So many at a time as are held in memory before they are written."""
    while window := list(itertools.islice(asked, _WINDOW)):
        yield window
