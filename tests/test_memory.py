"""The memory that is predicted, by hand; benchmarks/memory.py compares with runs."""

from __future__ import annotations

import dataclasses

import pytest
from transformers import AutoConfig

from posttrain import memory

OF = memory.Shape(
    parameters=1000,
    trainable=1000,
    parameter_bytes=4,
    compute_bytes=4,
    layers=3,
    hidden=5,
    kept=70,
    head=40,
    tokens=2,
    cpu=True,
)
"""Activations: 3 layers * 2 tokens * 70 numbers * 4 bytes = 1680."""


def test_one_process_in_float32() -> None:
    parts = memory.predict(OF)
    vocabulary = (64 << 20) + 2 * 5 * 4 + 40 * 4
    expected = {"weights": 4000, "gradients": 4000, "optimizer": 8000, "activations": 1680, "not at once": -1680}
    assert {name: size for name, size in parts.items() if size} == {
        "program": 640 << 20,
        **expected,
        "vocabulary": vocabulary,
    }


@pytest.mark.parametrize(
    ("changed", "purpose", "size"),
    [
        ({"checkpointing": True}, "activations", 3 * 2 * 5 * 4 + 2 * 70 * 4),
        ({"accumulated": True}, "not at once", 0),
        ({"compute_bytes": 2}, "casts", 2000),
        ({"compute_bytes": 2}, "activations", 840),
        ({"frozen_reference": True}, "reference", 4000),
        ({"trainable": 10}, "optimizer", 80),
        ({"adam": False}, "optimizer", 0),
        ({"shards": 2}, "buckets", 4000),
        ({"shards": 2, "sharded": "optimizer", "deepspeed": True}, "gradients", 2000),
        ({"shards": 2, "sharded": "optimizer", "deepspeed": True}, "optimizer", 6000),
        ({"shards": 2, "sharded": "optimizer", "deepspeed": True}, "weights", 4000),
        ({"shards": 2, "sharded": "all", "deepspeed": True, "frozen_reference": True}, "reference", 2000),
        ({"shards": 2, "sharded": "all"}, "buckets", 0),
        ({"cpu": False}, "program", 0),
        ({"cpu": False}, "vocabulary", (1 << 30) + 2 * 5 * 4 + 40 * 4),
        ({"vocabulary": False}, "vocabulary", 0),
    ],
)
def test_what_changes(changed: dict, purpose: str, size: int) -> None:
    assert memory.predict(dataclasses.replace(OF, **changed))[purpose] == size


def test_what_a_layer_keeps() -> None:
    """6 of the width, 4 of all heads, 4 of the MLP."""
    llama = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2}
    assert memory.kept(AutoConfig.for_model("llama", **llama, head_dim=24)) == 6 * 64 + 4 * 96 + 4 * 176
    assert memory.kept(AutoConfig.for_model("gpt2", n_embd=64, n_head=4)) == 6 * 64 + 4 * 64 + 4 * 256
    assert memory.kept(AutoConfig.for_model("qwen2", **llama)) == 6 * 64 + 4 * 64 + 4 * 176
    mamba = AutoConfig.for_model("mamba", hidden_size=64, intermediate_size=128)  # has no heads
    assert memory.kept(mamba) == 6 * 64 + 4 * 64 + 4 * 128
    mixture = llama | {"num_local_experts": 8, "num_experts_per_tok": 2}
    assert memory.kept(AutoConfig.for_model("mixtral", **mixture)) == 6 * 64 + 4 * 64 + 4 * 352
