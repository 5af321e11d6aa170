"""Rollouts from a vLLM server (`vllm serve`), over its OpenAI-compatible protocol with token ids in and out.

The server has to read the folder that weights are written to. It is started with

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs --generation-config vllm
    # on a CPU, too: --no-enable-chunked-prefill --worker-extension-cls posttrain.engines.worker.TiedHeads (worker.py, build.py)

(development mode opens the routes that reload weights; without it a server can sample, from its own weights). A server that is
gone or hangs is asked again with growing pauses. One that came back with other weights is recognised by the label that `sync`
left in it, and given the policy's weights before anything is sampled; what it sampled meanwhile is thrown away.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import AutoConfig

from ..schema import UserError
from ..settings import SamplingConfig
from . import worker
from .client import Client, EngineError
from .rollout import Rollout, refuse_prompts, seeds_for
from .stop import Stop
from .vllm import Export, parameters, rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("posttrain")

_START = "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs --generation-config vllm"
_RESTARTS = 3


class ServerEngine:
    """A vLLM server. Every process of a run may have one; all have to call `sync` together, and the first one acts.

    Args:
        url: such as http://localhost:8000.
        sampling: the settings.
        ends: tokens that end a completion.
        export: writes the policy's weights (all processes call it); None where `sync` is not needed.
        folder: where they are written, readable by the server under the same path.
        timeout: seconds to wait for an answer.
        retries: see `Client`.
        parallel: prompts that are asked for at a time; the server batches them.
        tokenizer: of the model, for `sampling.stop`.

    Raises:
        UserError: the server cannot be reached, or reports log-probs of another distribution than it samples from.
    """

    def __init__(
        self,
        url: str,
        sampling: SamplingConfig,
        *,
        ends: Sequence[int],
        export: Export | None = None,
        folder: Path | None = None,
        timeout: float = 600.0,
        retries: int = 8,
        parallel: int = 64,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.sampling, self.ends, self.export, self.parallel = sampling, tuple(ends), export, parallel
        self.stop = Stop(sampling.stop or (), tokenizer)
        self.folder = None if folder is None else folder.resolve()
        self._client = Client(url, timeout=timeout, retries=retries, connections=parallel)
        self._once, self._renews = Client(url, timeout=timeout, retries=0, connections=1), True
        self._run = broadcast_object_list([uuid.uuid4().hex])[0]
        self._synced: int | None = None
        served = self._client.call("GET", "/v1/models", hint=f"start it: {_START}")["data"][0]
        self._model, self._positions = served["id"], served.get("max_model_len")
        self._refuse_raw_logps()

    @property
    def version(self) -> int:
        """Version of the weights that it samples from; 0 before the first `sync`."""
        return self._synced or 0

    def generate(self, prompts: Sequence[Sequence[int]], n: int = 1, *, seeds: Sequence[int] | None = None) -> list[Rollout]:
        """n rollouts of each prompt, prompt after prompt; see `Engine.generate`."""
        refuse_prompts(prompts, self.sampling, self._positions, "engine vllm")
        seeds = seeds_for(self.sampling, self.version, prompts, seeds)
        for _ in range(_RESTARTS):
            if not self._holds_policy():
                self._load()
            with ThreadPoolExecutor(self.parallel) as pool:
                groups = list(pool.map(lambda one: self._group(*one, n), enumerate(zip(prompts, seeds, strict=True))))
            if self._holds_policy():
                return [one for group in groups for one in group]
        raise EngineError(f"engine vllm: the server at {self._client.url} lost its weights {_RESTARTS} times in one call")

    def sync(self, version: int) -> None:
        """Write the policy's weights, have the server reload them, and label them; all processes leave together."""
        if version == self._synced:
            return
        assert self.export is not None and self.folder is not None, "sync needs export and folder"
        self.export(self.folder)
        self._synced = version
        wrong = None
        if PartialState().is_main_process:
            try:
                self._load()
            except EngineError as error:
                wrong = str(error)
        (wrong,) = broadcast_object_list([wrong])  # or the others would wait for the first one forever
        if wrong is not None:
            raise EngineError(wrong)

    def close(self) -> None:
        """Close the connections; the server is its owner's."""
        self._client.close()
        self._once.close()

    def _label(self) -> str:
        return f"posttrain-{self._run}-{self._synced}"

    def _holds_policy(self) -> bool:
        """Whether the server has the weights that `sync` gave it; true before the first `sync`, when any will do."""
        if self._synced is None:
            return True
        hint = f"weights are replaced in development mode only: {_START}"
        return self._client.call("GET", "/weight_info", hint=hint)["weight_version"] == self._label()

    def _renew_head(self) -> bool:
        """Have the server renew a head that is tied to the embeddings (worker.py); False where it was not started for that."""
        if not AutoConfig.from_pretrained(self.folder).get_text_config().tie_word_embeddings:
            return True
        try:
            self._once.call("POST", "/collective_rpc", {"method": worker.REFRESH})
        except EngineError:
            return False
        return True

    def _load(self) -> None:
        hint = f"the server has to read {self.folder}, and to run in development mode: {_START}"
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(self.folder)}}
        self._client.call("POST", "/collective_rpc", body, hint=hint)
        renewed = self._renews and self._renew_head()
        if not self._client.call("POST", "/reset_prefix_cache")["success"]:
            raise EngineError(
                "engine vllm: the prefix cache could not be reset (other requests run?), so old and new weights would mix"
            )
        if self._renews and not renewed:  # and it is alive, or it had not answered by now
            log.warning(
                "engine vllm: the policy's head is tied to its embeddings; on a CPU, not on a GPU, the server at %s keeps the "
                "old one unless it is started with --worker-extension-cls %s",
                self._client.url,
                worker.NAME,
            )
        self._renews = renewed
        self._client.call("POST", "/update_weight_version", {"new_version": self._label()})

    def _group(self, group: int, asked: tuple[Sequence[int], int], n: int) -> list[Rollout]:
        prompt, seed = asked
        choices = self._complete(prompt, parameters(self.sampling, self.ends, n, seed))
        out = []
        for one in sorted(choices, key=lambda one: one["index"]):
            ids, logps = one.get("token_ids"), (one.get("logprobs") or {}).get("token_logprobs")
            if ids is None or logps is None or len(ids) != len(logps):
                raise EngineError(f"engine vllm: {self._client.url} gives no token ids with their log-probs; vLLM 0.32 does")
            found = rollout(prompt, ids, logps, one["finish_reason"], self.ends, group, self.version)
            out.append(self.stop.cut(found))
        return out

    def _complete(self, prompt: Sequence[int], settings: dict[str, Any]) -> list[dict[str, Any]]:
        body = {"model": self._model, "prompt": list(prompt), "return_token_ids": True, "add_special_tokens": False, **settings}
        return self._client.call("POST", "/v1/completions", body)["choices"]

    def _refuse_raw_logps(self) -> None:
        """Ask for the likeliest token's log-prob at two temperatures: where it is the same, it is that before temperature."""
        if self.sampling.temperature in (0, 1) and not self.sampling.truncated:
            return
        base = {"max_tokens": 1, "logprobs": 1, "seed": 0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        likeliest = [
            max(self._complete([1], base | {"temperature": temperature})[0]["logprobs"]["top_logprobs"][0].values())
            for temperature in (1.0, 2.0)
        ]
        if likeliest[0] == likeliest[1]:
            raise UserError(
                f"engine vllm: the server at {self._client.url} reports log-probs before temperature and truncation; start it "
                f"with --logprobs-mode processed_logprobs"
            )
