"""From the settings of an engine to the engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..models import bf16_available
from ..schema import UserError
from ..settings import EngineConfig, ModelConfig, SamplingConfig
from . import weights
from .file import FileEngine
from .hf import HFEngine
from .rollout import Engine
from .server import ServerEngine
from .vllm import VLLMEngine

_TAKES = {"hf": ("batch_size",), "vllm server": ("url", "timeout", "retries"), "vllm": ("options",), "file": ("path",)}
"""The settings that each kind of engine reads, beside `kind`."""


def build(
    config: EngineConfig,
    sampling: SamplingConfig,
    settings: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model: Callable[[], nn.Module],
    folder: Path | None = None,
    compute: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Engine:
    """The engine that `config` describes.

    Args:
        config: its settings.
        sampling: how it samples.
        settings: the model that it starts with.
        tokenizer: of that model.
        model: gives the policy, wrapped or not; called where it is needed.
        folder: where engines that reload weights find them; None for one that is never synchronised.
        compute: context to sample in, where the policy itself does (hf).

    Raises:
        UserError: a setting that this kind of engine would ignore or lacks, or an engine that cannot start.
    """
    refuse(config)
    export = None if folder is None else lambda into: weights.write(model(), into)
    ends = ends_of(settings, tokenizer)
    if config.kind == "file":
        return FileEngine(config.path or "", tokenizer, sampling.stop or ())
    shared = {"ends": ends, "tokenizer": tokenizer}
    if config.kind == "hf":
        size = config.batch_size or 32
        return HFEngine(model(), sampling, pad=tokenizer.pad_token_id, batch_size=size, compute=compute, **shared)
    shared |= {"export": export, "folder": folder}
    if config.url is None:
        return VLLMEngine(settings.name, sampling, options=_options(config, settings), **shared)
    more = {name: value for name in ("timeout", "retries") if (value := vars(config)[name]) is not None}
    return ServerEngine(config.url, sampling, **shared, **more)


def refuse(config: EngineConfig, where: str = "engine") -> None:
    """Refuse settings that would be ignored, and a file engine without a file."""
    if config.kind == "file" and config.path is None:
        raise UserError(f"{where}.path is required for kind = file: JSON lines of prompts and completions")
    kind = "vllm server" if config.kind == "vllm" and config.url is not None else config.kind
    for name, value in vars(config).items():
        if name != "kind" and value is not None and name not in _TAKES[kind]:
            belongs = next(other for other, names in _TAKES.items() if name in names)
            raise UserError(f"{where}.{name} is for {belongs} and would be ignored by {kind}; leave it out")


def ends_of(settings: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> Sequence[int]:
    """Tokens that end a completion: the tokenizer's eos, and those in the model's generation_config.json (an end of turn)."""
    found = [tokenizer.eos_token_id]
    with contextlib.suppress(OSError):  # many have none
        named = GenerationConfig.from_pretrained(settings.name, revision=settings.revision).eos_token_id
        found += named if isinstance(named, list) else [] if named is None else [named]
    return list(dict.fromkeys(found))


def _options(config: EngineConfig, settings: ModelConfig) -> dict[str, Any]:
    """Arguments of vllm.LLM: those of the model's settings that it shares, then the user's. `dtype: auto` means what it means
    for a model of ours that is not trained; vLLM's own takes float16 for float32 weights."""
    dtype = ("bfloat16" if bf16_available() else "float32") if settings.dtype == "auto" else settings.dtype
    shared = {"revision": settings.revision, "tokenizer": settings.tokenizer, "trust_remote_code": settings.trust_remote_code}
    if not torch.cuda.is_available():  # after a part of a prompt vLLM 0.32 turns a seeded generator back, which CPUs' cannot
        shared["enable_chunked_prefill"] = False
    return shared | {"dtype": dtype} | (config.options or {})
