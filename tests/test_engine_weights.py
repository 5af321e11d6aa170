"""What is written for other programs computes what the policy computes, and the policy is left as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from tiny_models import tiny
from torch import nn
from transformers import AutoModelForCausalLM

from posttrain.engines import weights
from posttrain.models import attach

IDS = torch.tensor([[1, 5, 9, 14, 33]])

CONFIGS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    "dora": LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True, init_lora_weights=False),
    "with a head of its own": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False),
}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", [None, *CONFIGS])
def test_written_weights_compute_the_same(name: str | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: nn.Module = tiny("llama", tie_word_embeddings=name is None)
    start = logits(model).clone()
    if name is not None:
        model = get_peft_model(model, CONFIGS[name])
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
    attach(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    weights.write(model, tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(read), logits(model.eval()), atol=2e-5, rtol=0)
    assert (name is None) == torch.equal(logits(model), start)
    after = model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_a_later_version_replaces_an_earlier_one(tmp_path: Path) -> None:
    for seed in (0, 1):
        model = tiny("llama", seed=seed)
        weights.write(model, tmp_path)
        torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
