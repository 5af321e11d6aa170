"""Tiny random models of many architectures, made from configurations, without dropout: `tiny("gemma2")`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 101
WINDOW = 8

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
_DECODER = _COMMON | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
_MIXED = _DECODER | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _DECODER),
    "qwen2": ("qwen2", _DECODER),
    "qwen2_sliding": ("qwen2", _MIXED | {"use_sliding_window": True}),
    "qwen3": ("qwen3", _DECODER),
    "gemma2": ("gemma2", _MIXED | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", _MIXED | {"query_pre_attn_scalar": 8}),
    "mistral": ("mistral", _DECODER | {"sliding_window": WINDOW}),
    "gpt2": (
        "gpt2",
        _COMMON
        | {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
    "gpt_neox": ("gpt_neox", _DECODER),
    "phi3": ("phi3", _DECODER),
    "olmo2": ("olmo2", _DECODER),
    "smollm3": ("smollm3", _MIXED | {"use_sliding_window": True, "no_rope_layers": [1, 0]}),
    "opt": (
        "opt",
        {key: value for key, value in _DECODER.items() if key not in ("num_key_value_heads", "head_dim", "intermediate_size")}
        | {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    ),
    "mamba": ("mamba", _COMMON | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
}
"""Name -> (model type, settings of its configuration)."""

SHARING = [name for name in MODELS if name != "mamba"]
"""Those whose attention can take a tree."""

WINDOWED = ["qwen2_sliding", "gemma2", "gemma3", "mistral", "smollm3"]
"""Those with a sliding window of `WINDOW` positions in some layer."""


def tiny(
    name: str,
    attention: str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    scores: bool = False,
    **settings: Any,
) -> PreTrainedModel:
    """A random model of the architecture `name` (a key of MODELS), the same for the same seed.

    Args:
        name: a key of MODELS.
        attention: sdpa, eager, ...; None leaves it to the model.
        dtype: of the parameters.
        seed: of the initialisation.
        scores: with one output that scores a text, in place of a vocabulary.
        settings: further settings of the configuration, over those of MODELS.
    """
    kind, common = MODELS[name]
    config = CONFIG_MAPPING[kind](**(common | settings | ({"num_labels": 1} if scores else {})))
    auto = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config, attn_implementation=attention, dtype=dtype)
    return model.eval()


def saved(folder: Path, tokenizer: PreTrainedTokenizerBase | None = None, *, rows: int = 0, **settings: Any) -> Path:
    """A folder with a tiny Llama (or `name`) and its tokenizer.

    Args:
        folder: where to.
        tokenizer: its own; None: `tiny_tokenizer()`.
        rows: more rows of the model's head than the tokenizer has tokens.
        settings: of `tiny`.
    """
    tokenizer = tokenizer or tiny_tokenizer()
    tiny(**{"name": "llama", "vocab_size": len(tokenizer) + rows} | settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
