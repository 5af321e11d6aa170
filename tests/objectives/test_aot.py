"""AOT on pairs against TRL, DPO and numbers worked by hand."""

from __future__ import annotations

import pytest
import torch
from golden import close, golden
from hand import at_the_ends, completions

from posttrain.objectives.preference.aot import AOTConfig, aot
from posttrain.objectives.preference.dpo import DPOConfig, dpo
from posttrain.registry import find
from posttrain.schema import UserError, parse
from posttrain.stats import Pairs


def test_released_code() -> None:
    """TRL's values are in the order of the policy's margins, ours in that of the rows."""
    official = golden("baseline_trl_aot")
    pairs = official.pairs()
    loss = aot(AOTConfig(beta=official.inputs["beta"]), pairs)
    order = (pairs.chosen.logp - pairs.rejected.logp).argsort()
    close(loss.values[order], official.outputs["per_example_losses"])
    close(loss.values.mean(), official.outputs["loss"])
    close(torch.autograd.grad(loss.values.mean(), official.policy_logits)[0], official.outputs["grad_policy_logits"])


def by_hand() -> Pairs:
    """Policy margins 1 and -2, reference margins -4 and 3: sorted (-2, 1) and (-4, 3), so m = 1 - 3 and -2 + 4 at beta 1."""
    return Pairs(chosen=completions([[1.0], [-2.0]], [[-4.0], [3.0]]), rejected=completions([[0.0], [0.0]]))


def test_by_hand() -> None:
    loss = aot(AOTConfig(beta=1), by_hand())
    close(loss.metrics["aot/margins"], [-2.0, 2.0])
    close(loss.metrics["rewards/margins"], [5.0, -5.0])
    close(loss.values, torch.tensor([2.0, -2.0], dtype=torch.float64).exp().log1p().tolist())
    smoothed = aot(AOTConfig(beta=1, label_smoothing=0.5), by_hand())
    close(smoothed.values, ((loss.values + loss.values.flip(0)) / 2).tolist())


def test_one_row_is_dpo() -> None:
    pairs = Pairs(chosen=completions([[-1.0, -2.0]], [[-2.0, -2.0]]), rejected=completions([[-4.0]], [[-1.0]]))
    close(aot(AOTConfig(), pairs).values, dpo(DPOConfig(), pairs).values.tolist(), 1e-12)


def test_declared_as_coupled() -> None:
    assert find("aot").coupled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ends(dtype: torch.dtype) -> None:
    _, _, (chosen, rejected) = at_the_ends(find("aot"), AOTConfig(), dtype=dtype)
    assert (chosen <= 0).all() and (rejected >= 0).all() and (chosen < 0).any()


def test_label_smoothing_is_a_share() -> None:
    with pytest.raises(UserError, match=r"^aot: label_smoothing = 2: Input should be less than or equal to 1$"):
        parse(AOTConfig, {"label_smoothing": 2}, "aot")
