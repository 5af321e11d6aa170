"""Real vLLM under a real model: SmolLM2-135M-Instruct (from PyPI), trained for five steps on what vLLM writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_vllm import OPTIONS, gap, pytestmark, ran, synced
from transformers import AutoModelForCausalLM

from posttrain.engines.rollout import Rollout
from posttrain.models import attach
from posttrain.quickstart import PAIRS, embedded_model
from posttrain.references import cache_folder
from posttrain.shipped import folder

__all__ = ["pytestmark"]


def test_smollm2_for_five_steps(tmp_path: Path) -> None:
    """The recipe of the benchmark on a real model of 135M: weights are brought over before every step, and the probe passes.
    Of what it became, both engines write the same greedily, and sampled log-probs are the trainer's, to 1e-3 nats a token."""
    start, rows, trained = embedded_model(cache_folder(None)), tmp_path / "rows.jsonl", tmp_path / "trained"
    prompts = [json.loads(line)["prompt"] for line in (PAIRS / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    rows.write_text("".join(json.dumps({"text": prompt}) + "\n" for prompt in prompts))
    recipe, options = folder("recipes") / "rlhf" / "smollm2-135m-sentiment.yaml", f"engine.options={json.dumps(OPTIONS)}"
    size = ["rollouts.group_size=4", "train.max_steps=5", "train.learning_rate=1e-4", "train.lr_scheduler_type=constant"]
    where = [f"model.name={start}", f"data.name={rows}", f"train.output_dir={trained}", "train.use_cpu=true"]
    ran("train", str(recipe), *where, *size, "engine=vllm", options)
    synced(trained)
    asked = [f"data.name={rows}", "data.columns.prompt=text", "data.format=plain", "data.limit=16", "max_new_tokens=24"]
    written = {}
    for engine, temperature in (("hf", 0), ("vllm", 0), ("vllm", 1)):
        file, more = tmp_path / f"{engine}-{temperature}.jsonl", [options] if engine == "vllm" else []
        ran("sample", f"model={trained}", *asked, f"engine={engine}", *more, f"temperature={temperature}", f"output={file}")
        written[engine, temperature] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for ours, theirs in zip(written["hf", 0], written["vllm", 0], strict=True):
        assert theirs["completion_ids"] == ours["completion_ids"]
        assert theirs["logps"][0] == pytest.approx(ours["logps"][0], abs=1e-3)
    sampled = [
        Rollout(line["prompt_ids"], line["completion_ids"][0], line["logps"][0], finished=True, group=i, version=0)
        for i, line in enumerate(written["vllm", 1])
    ]
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
    attach(model)
    assert gap(model, sampled) < 1e-3
