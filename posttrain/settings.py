"""The settings of a run, declared once: help, validation, JSON schema and docs are read from here. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is trained, and how it is loaded."""

    name: str
    """Hub id or folder of a causal language model."""

    revision: str | None = None
    """Branch, tag or commit on the hub; None is the default branch."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the parameters. auto: float32 for full fine-tuning (master weights; train.bf16 sets the compute dtype), and
    bfloat16 under an adapter where the device computes in it."""

    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] | None = None
    """Attention implementation; None is the model's default."""

    tokenizer: str | None = None
    """Hub id or folder of the tokenizer; None is the model's own."""

    chat_template: str | None = None
    """Chat template (Jinja text or a file with it) in place of the tokenizer's own."""

    trust_remote_code: bool = False
    """Run code that comes with the model."""

    dropout: bool = False
    """Keep the model's own dropout while training; off, so that policy and reference start equal."""

    peft: dict[str, Any] | None = None
    """Settings of a PEFT adapter, verbatim (r, lora_alpha, target_modules, ...; peft_type LORA unless given); None trains all."""

    merge: bool = False
    """Merge the adapter into the exported model."""


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """Where the reference's log-probs come from."""

    kind: Literal["auto", "frozen", "adapter", "cached"] = "auto"
    """frozen: a second model; adapter: the policy with its adapter off; cached: log-probs computed once and kept on disk.
    auto: adapter where one is trained, frozen otherwise."""

    model: str | None = None
    """Hub id or folder of the reference; None is the policy as it starts."""

    cache: str | None = None
    """Folder of cached log-probs; None is $POSTTRAIN_CACHE or ~/.cache/posttrain."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on."""

    name: str | None = None
    """Hub id, file (JSON, JSONL, Parquet, CSV) or folder."""
