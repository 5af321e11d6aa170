"""What both sides of a training step are given: a model, its tokenizer, rows of token ids.

A model is a folder or hub id, or `shape:<name>`, an untrained one of that shape with random rows, for machines without a hub.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

Row = dict[str, Any]

SIDES = ("chosen", "rejected")
GROUP = 8
"""Completions of a prompt in `group`."""

SHAPES = {
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 64},
    "llama-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "llama-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip
"""Name -> configuration of a Llama."""


def shape_of(options: argparse.Namespace) -> dict[str, Any] | None:
    """The configuration that `shape:<name>` stands for; None for a real model."""
    prefix, colon, name = options.model.partition(":")
    return SHAPES[name] if colon and prefix == "shape" else None


def load_model(options: argparse.Namespace) -> Any:
    """The model as transformers loads it, float32; the same weights each time."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    dtype = torch.bfloat16 if options.lora and options.dtype == "bfloat16" else torch.float32
    shape = shape_of(options)
    if shape is None:
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    torch.manual_seed(0)
    config = LlamaConfig(**shape, max_position_embeddings=8192, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    with torch.device("cuda" if torch.cuda.is_available() and not options.cpu else "cpu"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def fewer_layers(model: Any, layers: int) -> Any:
    """The model with only so many of its layers, evenly spaced, the first and the last among them; changed in place."""
    import torch

    kept = torch.linspace(0, len(model.model.layers) - 1, layers).round().int().tolist()
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in kept)
    model.config.num_hidden_layers = layers
    if model.config.to_dict().get("layer_types"):
        model.config.layer_types = [model.config.layer_types[i] for i in kept]
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number
    return model


def load_tokenizer(options: argparse.Namespace) -> Any:
    """The model's tokenizer; for a shape one of two tokens, which TRL's trainers pad with."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if shape_of(options) is None:
        return AutoTokenizer.from_pretrained(options.model)
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    tokenizer = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def rows_of(method: str, options: argparse.Namespace, count: int) -> list[Row]:
    """`count` rows as our trainer takes them, of which `options.batch` (group: one) are a step.

    Raises:
        SystemExit: the data have fewer.
    """
    source = groups(options) if method == "group" else pairs(options)
    rows = list(islice(source, count))
    if len(rows) < count:
        raise SystemExit(f"{options.data} has {len(rows)} rows that fit, {count} are needed; --steps or --batch less")
    match method:
        case "kto":
            return labelled(rows, options)
        case "kd":
            return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    return rows


def pairs(options: argparse.Namespace) -> Iterator[Row]:
    """Prompts with a chosen and a rejected completion, the end token included, that differ and fit the lengths asked for."""
    if shape_of(options) is not None:
        yield from _random_pairs(options)
        return
    tokenizer = load_tokenizer(options)
    with open(options.data, encoding="utf-8") as lines:
        for line in lines:
            texts = json.loads(line)
            prompt = tokenizer(texts["prompt"])["input_ids"]
            whole = [tokenizer(texts["prompt"] + texts[side] + tokenizer.eos_token)["input_ids"] for side in SIDES]
            joined = any(ids[: len(prompt)] != prompt for ids in whole)  # a token across the boundary
            if joined or whole[0] == whole[1] or not options.min_length <= max(map(len, whole)) <= options.max_length:
                continue
            yield {"prompt": prompt, **{side: [ids[len(prompt) :]] for side, ids in zip(SIDES, whole, strict=True)}}


def _random_pairs(options: argparse.Namespace) -> Iterator[Row]:
    """Prompts of half of the length asked for, and completions between a quarter and a half of it."""
    draw, size = random.Random(0), shape_of(options)["vocab_size"]
    half = options.max_length // 2

    def ids(length: int) -> list[int]:
        return [draw.randrange(2, size) for _ in range(length)]

    while True:
        yield {"prompt": ids(half), **{side: [[*ids(draw.randint(half // 2, half - 1)), 1]] for side in SIDES}}


def labelled(rows: list[Row], options: argparse.Namespace) -> list[Row]:
    """Of every pair one completion, chosen and rejected in turn, with that of the row before in its batch as a mismatched one
    (of the first row: of the last), which is how TRL pairs them."""
    own = [row[SIDES[i % 2]] for i, row in enumerate(rows)]
    out = []
    for i, row in enumerate(rows):
        first = i // options.batch * options.batch
        lender = first + (i - first - 1) % options.batch
        room = options.max_length - len(row["prompt"])
        mismatched = [own[lender][0][:room]]
        out.append({"prompt": row["prompt"], "completion": own[i], "mismatched": mismatched, "label": 1 - i % 2})
    return out


def groups(options: argparse.Namespace) -> Iterator[Row]:
    """Prompts of `group_prompt` tokens with eight completions of `group_completion`, cut from the pairs laid end to end, and
    the advantages of the completions, as GRPO has them."""
    stream = (token for row in pairs(options) for part in (row["prompt"], *row["chosen"]) for token in part)
    while len(prompt := list(islice(stream, options.group_prompt))) == options.group_prompt:
        completions = [list(islice(stream, options.group_completion)) for _ in range(GROUP)]
        if not completions[-1]:
            return
        yield {"prompt": prompt, "completion": completions, "advantage": advantages([reward(ids) for ids in completions])}


def reward(completion: list[int]) -> float:
    """How many different tokens there are."""
    return float(len(set(completion)))


def advantages(rewards: list[float]) -> list[float]:
    """Of each reward its distance from the mean of the group, over their standard deviation (n - 1) and 1e-4."""
    mean = sum(rewards) / len(rewards)
    deviation = (sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)) ** 0.5
    return [(r - mean) / (deviation + 1e-4) for r in rewards]
