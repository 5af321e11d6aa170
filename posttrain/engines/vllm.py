"""Rollouts from vLLM that this process starts, on the same machine: in processes of its own on GPUs, on CPUs in this one.

New weights go through a folder: the policy is written as safetensors and vLLM reloads it in place, on any device.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from ..schema import UserError
from ..settings import SamplingConfig
from . import worker
from .client import EngineError
from .guard import Guard
from .rollout import Rollout, cut, refuse_prompts, seeds_for
from .stop import Stop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

Export = Callable[[Path], None]
"""Writes the policy's present weights into a folder, as safetensors that `from_pretrained` reads (weights.py)."""


class VLLMEngine:
    """vLLM in this program, for runs of one process; several processes share a server (server.py).

    On CPUs vLLM's processes would wait for each other by spinning, on the cores that compute: there it is one with this process
    (VLLM_ENABLE_V1_MULTIPROCESSING=0), unless the environment says otherwise.

    Args:
        model: folder or hub id of the model to start with; `sync` replaces its weights.
        sampling: the settings.
        ends: tokens that end a completion.
        export: writes the policy's weights; None where `sync` is not needed.
        folder: where they are written.
        options: further arguments of vllm.LLM, verbatim (dtype, max_model_len, gpu_memory_utilization, ...).
        tokenizer: of the model, for `sampling.stop`.

    Raises:
        UserError: vLLM is not installed, or refuses an option.
    """

    def __init__(
        self,
        model: str,
        sampling: SamplingConfig,
        *,
        ends: Sequence[int],
        export: Export | None = None,
        folder: Path | None = None,
        options: Mapping[str, Any] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise UserError("engine vllm: vllm is not installed; pip install 'posttrain[vllm]', or give engine.url of a server")
        import vllm

        self.sampling, self.ends, self.export, self.folder = sampling, tuple(ends), export, folder
        self.stop = Stop(sampling.stop or (), tokenizer)
        fixed = {
            "logprobs_mode": "processed_logprobs",  # those of the tempered distribution that is sampled from
            "generation_config": "vllm",  # nothing from the model's generation_config.json, such as a repetition penalty
            "worker_extension_cls": worker.NAME,  # reloads tied heads, too
        }
        for name in fixed.keys() & (options or {}).keys():
            raise UserError(f"engine.options.{name} is set here, to {fixed[name]}: rollouts have to be of the policy itself")
        if not torch.cuda.is_available():
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        self._guard = Guard()
        try:
            with kept_randomness():
                self._llm: Any = vllm.LLM(model=model, **fixed, **(options or {}))
        except (TypeError, ValueError, OSError, RuntimeError) as error:
            self._guard.close()
            raise UserError(f"engine vllm: {' '.join(str(error).split())}") from None
        self._guard.settle()
        self._parameters = vllm.SamplingParams
        self._synced: int | None = None

    @property
    def version(self) -> int:
        """Version of the weights that it samples from; 0 before the first `sync`."""
        return self._synced or 0

    def generate(self, prompts: Sequence[Sequence[int]], n: int = 1, *, seeds: Sequence[int] | None = None) -> list[Rollout]:
        """n rollouts of each prompt, prompt after prompt; see `Engine.generate`."""
        refuse_prompts(prompts, self.sampling, self._llm.model_config.max_model_len, "engine vllm")
        seeds = seeds_for(self.sampling, self.version, prompts, seeds)
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        detokenize = bool(self.stop.strings)
        settings = [self._parameters(**parameters(self.sampling, self.ends, n, seed), detokenize=detokenize) for seed in seeds]
        answers = self._alive(lambda: self._llm.generate(asked, settings, use_tqdm=False)) if prompts else []
        out = []
        for group, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            for one in sorted(answer.outputs, key=lambda one: one.index):
                ids = list(one.token_ids)
                logps = [step[token].logprob for token, step in zip(ids, one.logprobs, strict=True)]
                out.append(self.stop.cut(rollout(prompt, ids, logps, one.finish_reason, self.ends, group, self.version)))
        return out

    @staticmethod
    def _alive(work: Callable[[], T]) -> T:
        """What `work` gives.

        Raises:
            EngineError: vLLM failed, or its process died.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            with kept_randomness():
                return work()
        except EngineDeadError as error:
            raise EngineError(f"engine vllm: its process died; what it wrote is above: {error}") from error
        except RuntimeError as error:
            raise EngineError(f"engine vllm: {' '.join(str(error).split())}") from error

    def sync(self, version: int) -> None:
        """Write the policy's weights, have vLLM reload them, and forget what it cached of the old ones."""
        if version == self._synced:
            return
        assert self.export is not None and self.folder is not None, "sync needs export and folder"
        self.export(self.folder)
        self._alive(lambda: self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(self.folder)}))
        self._alive(lambda: self._llm.collective_rpc(worker.REFRESH))
        if not self._alive(self._llm.reset_prefix_cache):
            raise EngineError("engine vllm: the prefix cache could not be reset, so old and new weights would mix")
        self._synced = version

    def close(self) -> None:
        """End vLLM's process."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
            self._guard.close()


@contextlib.contextmanager
def kept_randomness() -> Iterator[None]:
    """The generators of this process (its CPU) are afterwards as they were: vLLM seeds and uses those of the one it is in."""
    ours, numpys = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(ours)
            np.random.set_state(numpys)


def parameters(sampling: SamplingConfig, ends: Sequence[int], n: int, seed: int) -> dict[str, Any]:
    """The settings of one request, by the names that vLLM and its server have for them; none is left to a default."""
    return {
        "n": n,
        "seed": seed,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": list(ends) if sampling.stop_at_eos else [],
        "ignore_eos": not sampling.stop_at_eos,
        "stop": list(sampling.stop or ()),
        "logprobs": 0,  # of the sampled token alone
    }


def rollout(
    prompt: Sequence[int],
    ids: list[int],
    logps: list[float],
    finish_reason: str | None,
    ends: Sequence[int],
    group: int,
    version: int,
) -> Rollout:
    """A completion of vLLM as a rollout, cut at the first end token."""
    kept, ended = cut(ids, ends if finish_reason == "stop" else ())
    return Rollout(list(prompt), kept, logps[: len(kept)], ended or finish_reason == "stop", group, version)
