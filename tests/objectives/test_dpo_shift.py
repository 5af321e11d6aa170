"""DPO-Shift and Flex-DPO against an independent formula, DPO, the authors' schedules and numbers worked by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from golden import close, tensor
from hand import at_the_ends, pairs, slopes

from posttrain.objectives.preference.dpo import DPOConfig, dpo
from posttrain.objectives.preference.dpo_shift import DPOShiftConfig, dpo_shift
from posttrain.registry import find
from posttrain.schema import UserError, parse
from posttrain.stats import Completions, Pairs

FLEX = json.loads((Path(__file__).parents[1] / "goldens" / "t2_flex_dpo.json").read_text())


@pytest.mark.parametrize("case", FLEX["cases"], ids=lambda case: f"{case['beta_minus']}-{case['sft_coef']}")
def test_flex_dpo(case: dict) -> None:
    leaves = {}

    def side(role: str) -> Completions:
        mask = tensor(FLEX["inputs"][f"{role}_mask"]).bool()
        tokens = torch.tensor(FLEX["inputs"][f"{role}_tokens"])[..., None]
        leaves[role] = tensor(FLEX["inputs"][f"policy_{role}_logits"]).requires_grad_()
        policy, reference = (
            logits.log_softmax(-1).gather(-1, tokens).squeeze(-1)[mask]
            for logits in (leaves[role], tensor(FLEX["inputs"][f"ref_{role}_logits"]))
        )
        return Completions(logps=policy, lengths=mask.sum(1), reference_logps=reference)

    lam = case["beta_minus"] / case["beta_plus"]
    config = DPOShiftConfig(beta=case["beta_plus"], lam=lam, sft=case["sft_coef"])
    loss = dpo_shift(config, Pairs(chosen=side("chosen"), rejected=side("rejected")))
    close(loss.values, case["per_example_loss"])
    close(loss.values.mean(), case["loss"])
    loss.values.mean().backward()
    for role, logits in leaves.items():
        close(logits.grad, case[f"grad_policy_{role}_logits"])


def test_by_hand() -> None:
    """beta 0.5, lam 0.5, log-ratios -2 and 4: rewards -1 and 0.5 * 2 = 1, m = -2; slopes -0.5 and 0.25 times sigmoid(2)."""
    batch = pairs([-2.0], [4.0])
    loss = dpo_shift(DPOShiftConfig(beta=0.5, lam=0.5), batch)
    close(loss.values, [math.log1p(math.exp(2))])
    close(loss.metrics["rewards/chosen"], [-1.0])
    close(loss.metrics["rewards/rejected"], [1.0])
    close(loss.metrics["rewards/unshifted_margins"], [-3.0])
    weight = 1 / (1 + math.exp(-2))
    chosen, rejected = slopes(loss, batch)
    close(chosen, [-0.5 * weight])
    close(rejected, [0.25 * weight])


def test_a_factor_of_1_is_dpo() -> None:
    batch = pairs([1.0, -2.0], [0.5, 3.0])
    shifted = dpo_shift(DPOShiftConfig(beta=0.1, lam=1, label_smoothing=0.2), batch)
    close(shifted.values, dpo(DPOConfig(label_smoothing=0.2), batch).values.tolist(), 1e-12)


@pytest.mark.parametrize(("lam", "lam_end", "at"), [(0.5, 1.0, (0.5, 0.625, 1.0)), (1.0, 0.5, (1.0, 0.875, 0.5))])
def test_schedules(lam: float, lam_end: float, at: tuple[float, ...]) -> None:
    """lmin + (lmax - lmin) k / K and lmax - (lmax - lmin) k / K at k / K of 0, 1/4 and 1."""
    for progress, expected in zip((0.0, 0.25, 1.0), at, strict=True):
        batch = dataclasses.replace(pairs([0.0], [4.0]), context={"progress": torch.tensor(progress)})
        loss = dpo_shift(DPOShiftConfig(beta=0.5, lam=lam, lam_end=lam_end), batch)
        assert loss.metrics["lam"].item() == expected
        close(loss.values, [math.log1p(math.exp(expected * 2))])


def test_start_is_log_2_without_the_nll() -> None:
    assert find("dpo_shift").start(DPOShiftConfig()) == math.log(2)
    assert find("dpo_shift").start(DPOShiftConfig(sft=0.1)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ends(dtype: torch.dtype) -> None:
    chosen, rejected, gradients = at_the_ends(find("dpo_shift"), DPOShiftConfig(), dtype=dtype)
    out_of_order = chosen <= 0.75 * rejected
    assert (gradients[0][out_of_order] < 0).all() and (gradients[1][out_of_order] > 0).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lam": 0}, "dpo_shift: lam = 0: Input should be greater than 0"),
        ({"lam_end": 1.5}, "dpo_shift: lam_end = 1.5: Input should be less than or equal to 1"),
    ],
)
def test_refused_settings(values: dict[str, float], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(DPOShiftConfig, values, "dpo_shift")
    assert str(error.value) == message
