"""Predicted peak memory of one device, from the configuration of a model. An estimate to plan with, not a measurement.

    program      Python and its libraries, where there is no GPU
    weights      parameters * bytes of their dtype
    gradients    trainable parameters * bytes of their dtype
    optimizer    trainable parameters * 8 (the two float32 moments of Adam; 0 for SGD), and DeepSpeed's master weights
    buckets      gradients on their way to other processes, without FSDP2: as large as all of them
    reference    a frozen model: parameters * bytes; otherwise 0
    teachers     their parameters * bytes
    casts        the weights in 16 bits, where they are kept in 32 and computed with in 16
    activations  tokens * layers * what a layer keeps of a token for its backward (`kept`), under an attention that stores no
                 [T, T] matrix; with gradient checkpointing the hidden state of every layer, and one layer whole
    states       of completion tokens in the reference's layers, for an objective that reads them: tokens * layers * hidden, as
                 computed and in float32
    rollouts     keys and values of the tokens that this process samples at a time
    vocabulary   the workspace of the kernel and the hidden states of completion tokens

Sharding divides: ZeRO-2 gradients and optimizer, ZeRO-3 and FSDP2 weights and reference too, ZeRO-3 teachers. `not at once` is
what a backward frees while it makes the gradients, where none are there from an earlier micro-batch of the step.
benchmarks/README.md compares with what runs take.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import nn
from transformers import TrainingArguments

from .models import causal_lm, parameter_counts
from .recipe import Run
from .settings import GROUP
from .stats import States, roles_of
from .trees import shareable

_LOOKED_AT = 256
_PROGRAM = 640 * 2**20
"""Bytes of a process that has imported everything and read a small model: measured."""

_WORKSPACE = {"cpu": 64 * 2**20, "other": 2**30}
"""Bytes of the kernel's tiles, its defaults."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the estimate needs to know of a run."""

    parameters: int
    """All parameters of the policy."""

    trainable: int
    """Those that are trained."""

    parameter_bytes: int
    """Bytes of one, 2 or 4."""

    compute_bytes: int
    """Bytes of one activation, 2 or 4."""

    layers: int
    """Decoder layers."""

    hidden: int
    """Width."""

    kept: int
    """Numbers that a layer keeps of a token for its backward."""

    head: int = 0
    """Parameters of the output head, if it is trained."""

    tokens: int
    """Tokens in a micro-batch: prompts (once or, with separate sequences, per completion) and completions."""

    checkpointing: bool = False
    """Gradient checkpointing."""

    accumulated: bool = False
    """A step has several micro-batches: the gradients of the first are there when the others are computed."""

    frozen_reference: bool = False
    """A second model is held."""

    teacher_bytes: int = 0
    """Of all teachers' parameters."""

    states: bool = False
    """The states of the reference's layers are kept; it is taken to be as large as the policy."""

    vocabulary: bool = True
    """Log-probs are taken over the vocabulary."""

    sampled: int = 0
    """Tokens, prompts too, of the completions that are sampled at a time in this process; 0 where none are."""

    cache: int = 0
    """Keys and values of one token in one layer: numbers."""

    adam: bool = True
    """The optimizer keeps two moments."""

    shards: int = 1
    """Processes that share what is sharded."""

    sharded: str = "none"
    """`none`, `optimizer` (ZeRO-2) or `all` (ZeRO-3, FSDP2)."""

    deepspeed: bool = False
    """DeepSpeed shards."""

    cpu: bool = False
    """There is no GPU: the libraries count, and the kernel takes less."""


def shape(
    run: Run,
    args: TrainingArguments,
    model: nn.Module,
    rows: Iterable[Mapping[str, Any]],
    kind: str,
    teacher_bytes: int = 0,
) -> Shape:
    """What the estimate needs, of a run.

    Args:
        run: its settings.
        args: the same `train:` section, complete.
        model: the policy; it may be without weights (on the meta device).
        rows: tokenised rows; the first ones are looked at.
        kind: of reference (references.kind_of).
        teacher_bytes: of the teachers' parameters (teachers.sizes).
    """
    total, trainable = parameter_counts(model)
    lm = causal_lm(model)
    config = lm.config.get_text_config()
    weight = max((p for p in model.parameters()), key=lambda p: p.numel())
    shared = run.layout != "separate" and not shareable(model)
    rows = _imagined(run, rows) if run.objective.online else rows
    return Shape(
        parameters=total,
        trainable=trainable,
        parameter_bytes=weight.element_size(),
        compute_bytes=2 if args.bf16 or args.fp16 else weight.element_size(),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        kept=kept(config),
        head=0 if run.objective.scores else parameter_counts(lm.get_output_embeddings())[1],
        tokens=round(args.per_device_train_batch_size * _tokens(rows, roles_of(run.objective.family), shared)),
        checkpointing=args.gradient_checkpointing,
        accumulated=args.gradient_accumulation_steps > 1,
        frozen_reference=kind in ("frozen", "ema", "soup"),
        sampled=_sampled(run, rows),
        cache=2 * _heads(config)[1],
        teacher_bytes=teacher_bytes,
        states=States() in run.objective.want(run.config),
        vocabulary=not run.objective.scores,
        adam="adam" in args.optim.lower(),
        shards=args.world_size,
        sharded=_sharded(),
        deepspeed=PartialState().distributed_type == "DEEPSPEED",
        cpu=not torch.accelerator.is_available() or args.use_cpu,
    )


def kept(config: Any) -> int:
    """Numbers that a decoder layer keeps of a token for its backward, from its configuration.

    Two norms keep input, normalised input and output; attention keeps q, k, v (repeated for each head) and its output; a gated
    MLP of SiLU keeps the gate, its activation, the other half and their product.
    """
    values = config.to_dict()
    inner = values.get("intermediate_size") or values.get("ffn_dim") or values.get("n_inner") or 4 * config.hidden_size
    if values.get("num_experts_per_tok"):
        inner = (values.get("moe_intermediate_size") or inner) * values["num_experts_per_tok"]
    return 6 * config.hidden_size + 4 * _heads(config)[0] + 4 * inner


def _heads(config: Any) -> tuple[int, int]:
    """Width of all heads of queries, and of those of keys; of a model that does not tell them apart, that of the model."""
    values, hidden = config.to_dict(), config.hidden_size
    queries = values.get("num_attention_heads")
    if not queries:
        return hidden, hidden
    width = values.get("head_dim") or hidden // queries
    return queries * width, (values.get("num_key_value_heads") or queries) * width


def _imagined(run: Run, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The first prompts with as many and as long completions as a method may sample."""
    completions = [range(run.sampling.max_new_tokens)] * (run.rollouts.group_size or GROUP)
    return [{"prompt": row["prompt"], "completion": completions} for row in itertools.islice(rows, _LOOKED_AT)]


def _sampled(run: Run, rows: Sequence[Mapping[str, Any]]) -> int:
    if not run.objective.online or run.engine.kind != "hf":
        return 0
    longest = max(len(row["prompt"]) for row in rows) + run.sampling.max_new_tokens
    return longest * (run.engine.batch_size or 32)


def _tokens(rows: Iterable[Mapping[str, Any]], roles: Sequence[str], shared: bool) -> float:
    """Tokens a row takes through the model, the 95th percentile of the first rows."""
    found = []
    for row in itertools.islice(rows, _LOOKED_AT):
        sides = [len(completion) for role in roles for completion in row[role]]
        found.append(sum(sides) + len(row["prompt"]) * (1 if shared else len(sides)))
    return float(np.quantile(found, 0.95))


def _sharded() -> str:
    """How accelerate was told to shard: `none`, `optimizer` or `all`."""
    kind = PartialState().distributed_type
    if kind == "DEEPSPEED":
        return "all" if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3" else "optimizer"
    return "all" if kind == "FSDP" else "none"


def predict(of: Shape) -> dict[str, float]:
    """Bytes by purpose, on one device."""
    weights_over = of.shards if of.sharded == "all" else 1
    optimizer_over = of.shards if of.sharded in ("all", "optimizer") else 1
    layer = of.tokens * of.kept * of.compute_bytes
    inputs = of.tokens * of.hidden * of.layers * of.compute_bytes
    gradients = of.trainable * of.parameter_bytes
    activations = inputs + layer if of.checkpointing else layer * of.layers
    head = of.tokens * of.hidden * of.compute_bytes + of.head * 4
    return {
        "program": _PROGRAM * of.cpu,
        "weights": of.parameters * of.parameter_bytes / weights_over,
        "gradients": gradients / optimizer_over,
        "optimizer": of.trainable * (8 * of.adam + 4 * of.deepspeed) / optimizer_over,
        "buckets": gradients * (of.shards > 1 and (of.deepspeed or of.sharded != "all")),
        "reference": of.parameters * of.parameter_bytes * of.frozen_reference / weights_over,
        "teachers": of.teacher_bytes / weights_over,
        "casts": of.parameters * 2 * (of.compute_bytes < of.parameter_bytes) / weights_over,
        "activations": activations,
        "not at once": -min(gradients / optimizer_over, activations) * (not of.accumulated),
        "states": of.tokens * of.layers * of.hidden * (of.compute_bytes + 4) * of.states,
        "rollouts": of.sampled * of.layers * of.cache * of.compute_bytes,
        "vocabulary": (_WORKSPACE["cpu" if of.cpu else "other"] + head) * of.vocabulary,
    }


def gib(size: float) -> str:
    """Bytes as text in GiB."""
    return f"{size / 2**30:.2f} GiB" if size < 10 * 2**30 else f"{size / 2**30:.1f} GiB"
