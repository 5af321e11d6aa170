"""References that are no checkpoint as it stands: a moving average of the policy, and the mean of several checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_steps import folder, logs, run, trained
from tiny import tiny_tokenizer
from tiny_models import tiny

from posttrain.schema import UserError

__all__ = ["folder"]

EMA = ["beta=0.1", "reference.kind=ema", "reference.rate=0.25", "reference.period=2", "train.max_steps=4"]


def test_a_reference_that_follows_the_policy(folder: Path, tmp_path: Path) -> None:
    """After steps 2 and 4 it is a quarter of the way to the policy; a resumed run has the same one."""
    start = {name: one.detach().clone() for name, one in run(folder, tmp_path / "start", *EMA).model.named_parameters()}
    whole = trained(folder, tmp_path / "whole", *EMA, "train.save_steps=2")
    half = trained(folder, tmp_path / "half", *EMA[:-1], "train.max_steps=2")
    two, four = (dict(prepared.model.named_parameters()) for prepared in (half, whole))
    for name, reference in whole.trainer.reference.lm.named_parameters():
        expected = 0.75 * (0.75 * start[name] + 0.25 * two[name]) + 0.25 * four[name]
        torch.testing.assert_close(reference, expected.detach(), rtol=0, atol=1e-6)
    assert logs(whole)[:2] == logs(half), "until then it stands where the policy began"
    resumed = trained(folder, tmp_path / "whole", *EMA, "train.save_steps=2", resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert logs(resumed) == logs(whole)
    (tmp_path / "whole" / "checkpoint-2" / "reference.safetensors").unlink()
    with pytest.raises(UserError, match="does not hold the moving reference"):
        trained(folder, tmp_path / "whole", *EMA, "train.save_steps=2", resume=str(tmp_path / "whole" / "checkpoint-2"))


def test_a_soup_is_the_mean_of_checkpoints(folder: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    models = [tiny("llama", vocab_size=len(tokenizer), seed=seed) for seed in (0, 1)]
    for model, name in zip(models, "ab", strict=True):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    chosen = f"[{{name: {tmp_path / 'a'}, weight: 3}}, {tmp_path / 'b'}]"
    prepared = trained(
        folder, tmp_path / "out", "beta=0.1", "reference.kind=soup", f"reference.models={chosen}", "train.max_steps=1"
    )
    pairs = zip(*(model.parameters() for model in models), prepared.trainer.reference.lm.parameters(), strict=True)
    for one, other, mean in pairs:
        torch.testing.assert_close(mean, (0.75 * one + 0.25 * other).detach(), rtol=0, atol=1e-6)
    assert logs(prepared)[0]["rollouts/kl"] != 0
