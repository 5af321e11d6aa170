"""Rollouts under DeepSpeed ZeRO-3, which keeps no whole weight anywhere: gathered for a call, and cut again after it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from pathlib import Path

import deepspeed
import torch
from transformers import AutoModelForCausalLM
from test_engine_hf import PROMPTS, engine, trained
from tiny_models import tiny

from posttrain.engines import weights

model = trained("llama")
alone = engine(model).generate(PROMPTS, 2)
zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
optimizer = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "optimizer": optimizer}
wrapped, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)

def cut() -> bool:
    return all(parameter.numel() == 0 for parameter in model.parameters())

assert cut()
assert engine(wrapped).generate(PROMPTS, 2) == alone
assert cut() and model.training
ids = torch.tensor([PROMPTS[0]])
loss = wrapped(input_ids=ids, labels=ids).loss  # the hooks that gather and cut are back
wrapped.backward(loss)
wrapped.step()
after = engine(wrapped).generate(PROMPTS, 2)
assert [one.completion for one in after] != [one.completion for one in alone]
weights.write(wrapped, Path(sys.argv[1]))
assert cut()
written = AutoModelForCausalLM.from_pretrained(sys.argv[1])
for one, other in zip(engine(written).generate(PROMPTS, 2), after, strict=True):
    assert one.completion == other.completion
print("passed")
"""


@pytest.mark.multi
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
def test_zero3_gathers_the_weights_for_a_call(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    got = subprocess.run([*launch, str(script), str(tmp_path / "model")], capture_output=True, text=True, env=environment)
    assert got.returncode == 0, got.stderr[-3000:]
    assert "passed" in got.stdout
