"""A live reference reads the completions of a step and those read before it at once, and says what it says of each apart."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny
from trajectory import rows_for
from transformers import TrainingArguments

from posttrain.models import attach
from posttrain.reference import AdapterOff, FrozenModel
from posttrain.registry import find
from posttrain.trainer import Trainer

SIZES = (3, 2, 0)
"""Rows of the micro-batches of the step; a process may have none."""


def gpt2(seed: int) -> torch.nn.Module:
    """A model that computes all in float64."""
    return copy.deepcopy(tiny("gpt2", dtype=torch.float64, seed=seed))


def trainer_of(name: str, folder: Path, layout: str, adapter: bool) -> Trainer:
    """One whose policy is not its reference."""
    policy = gpt2(0)
    if adapter:
        torch.manual_seed(0)
        lora = LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights=False)
        policy = get_peft_model(policy, lora).double()
    attach(policy)
    other = gpt2(1)
    attach(other)
    objective = find(name)
    args = TrainingArguments(output_dir=str(folder), use_cpu=True, per_device_eval_batch_size=4, report_to=[], max_steps=1)
    trainer = Trainer(
        objective=objective,
        config=objective.config(),
        model=policy,
        args=args,
        reference=AdapterOff() if adapter else FrozenModel(other, "other"),
        layout=layout,
        train_dataset=rows_for(objective),
    )
    trainer.state.max_steps = 1
    return trainer


def calls_of(trainer: Trainer) -> list[int]:
    """Grows by the number of tokens that are read whenever its reference is asked from now on."""
    found, answer = [], trainer.reference.answer

    def counted(model: Any, batch: dict[str, torch.Tensor], *args: Any) -> dict[str, torch.Tensor]:
        found.append(int((batch["tree"] > 0).sum()))
        return answer(model, batch, *args)

    trainer.reference.answer = counted
    return found


def step_of(trainer: Trainer) -> tuple[dict[str, float], torch.Tensor]:
    """Loss, what was logged and known before the step, and its gradient."""
    rows, at, micro = list(trainer.train_dataset), 0, []
    for size in SIZES:
        micro.append(trainer.data_collator(rows[at : at + size]))
        at += size
    trainer.model.train()
    trainer.model.zero_grad()
    batches, counts = trainer.get_batch_samples(iter(micro), len(SIZES), torch.device("cpu"))
    loss = sum(trainer.compute_loss(trainer.model, batch, num_items_in_batch=counts) for batch in batches)
    loss.backward()
    known = {name: value.item() for name, value in batches[0].items() if name.startswith("context.")}
    logged = trainer.meter.reduce(trainer.accelerator)
    gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    return {"loss": loss.item(), **known, **logged}, gradient


@pytest.mark.parametrize("layout", ["tree", "separate"])
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("name", ["kto", "wpo_kto"])
def test_the_step_is_that_of_a_reference_asked_apart(name: str, adapter: bool, layout: str, tmp_path: Path) -> None:
    trainer = trainer_of(name, tmp_path, layout, adapter)
    calls = calls_of(trainer)
    numbers, gradient = step_of(trainer)
    assert len(calls) == len(SIZES)
    tokens = sum(calls)
    trainer.data_collator.both = None
    trainer.meter.clear()
    calls.clear()
    expected, slope = step_of(trainer)
    assert len(calls) == 2 * len(SIZES)
    prompts = sum(len(row["prompt"]) for row in list(trainer.train_dataset)[: sum(SIZES)])
    filler = SIZES.count(0)
    assert sum(calls) - tokens == filler + (prompts if layout == "tree" else 0)
    assert abs(numbers["context.z0_raw"]) > 1e-2 and gradient.norm() > 1e-2
    assert numbers == pytest.approx(expected, rel=0, abs=1e-12)
    torch.testing.assert_close(gradient, slope, rtol=0, atol=1e-12)


def test_held_out_rows_are_asked_twice(tmp_path: Path) -> None:
    """All of them before the first loss, so that nothing of them is kept: with the same numbers as in a step."""
    trainer = trainer_of("kto", tmp_path, "tree", False)
    rows = [trainer.train_dataset[i] for i in range(sum(SIZES))]
    calls = calls_of(trainer)
    held_out = trainer.evaluate(rows)
    assert len(calls) == 4
    expected, _ = step_of(trainer)
    assert held_out["eval_kl/z0_raw"] == pytest.approx(expected["kl/z0_raw"], abs=1e-6)
    assert held_out["eval_loss"] == pytest.approx(expected["loss"], abs=1e-6)


def test_nothing_is_read_together_that_is_cached_or_not_read_before_a_step(tmp_path: Path) -> None:
    trainer = trainer_of("kto", tmp_path, "tree", False)
    assert trainer.data_collator.both.roles == ["completion", "mismatched"]
    assert trainer_of("ipo", tmp_path, "tree", False).data_collator.both is None
    trainer.reference = None
    assert trainer.collator().both is None
