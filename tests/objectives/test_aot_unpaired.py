"""AOT without pairing against TRL, DPO and numbers worked by hand."""

from __future__ import annotations

import pytest
import torch
from golden import close, golden
from hand import at_the_ends, completions, pairs

from posttrain.objectives.preference.aot_unpaired import AOTUnpairedConfig, aot_unpaired
from posttrain.objectives.preference.dpo import DPOConfig, dpo
from posttrain.registry import find
from posttrain.schema import UserError, parse
from posttrain.stats import Pairs


def test_released_code() -> None:
    """TRL's values are in the order of the chosen log-ratios, ours in that of the rows."""
    official = golden("baseline_trl_aot_unpaired")
    batch = official.pairs()
    loss = aot_unpaired(AOTUnpairedConfig(beta=official.inputs["beta"]), batch)
    close(loss.values[batch.chosen.logratio.argsort()], official.outputs["per_example_losses"])
    close(loss.values.mean(), official.outputs["loss"])
    close(torch.autograd.grad(loss.values.mean(), official.policy_logits)[0], official.outputs["grad_policy_logits"])


def test_by_hand() -> None:
    """Chosen 3 and -1, rejected 2 and 5: sorted (-1, 3) and (2, 5), so the first row meets 5, the second 2."""
    loss = aot_unpaired(AOTUnpairedConfig(beta=1), pairs([3.0, -1.0], [2.0, 5.0]))
    close(loss.metrics["aot/margins"], [-2.0, -3.0])
    close(loss.metrics["rewards/margins"], [1.0, -6.0])
    close(loss.values, torch.tensor([2.0, 3.0], dtype=torch.float64).exp().log1p().tolist())


def test_pairing_does_not_matter() -> None:
    one = aot_unpaired(AOTUnpairedConfig(label_smoothing=0.1), pairs([3.0, -1.0, 0.5], [2.0, 5.0, -4.0]))
    other = aot_unpaired(AOTUnpairedConfig(label_smoothing=0.1), pairs([3.0, -1.0, 0.5], [-4.0, 2.0, 5.0]))
    close(one.values, other.values.tolist(), 0)


def test_one_row_is_dpo() -> None:
    batch = Pairs(chosen=completions([[-1.0, -2.0]], [[-2.0, -2.0]]), rejected=completions([[-4.0]], [[-1.0]]))
    close(aot_unpaired(AOTUnpairedConfig(), batch).values, dpo(DPOConfig(), batch).values.tolist(), 1e-12)


def test_declared_as_coupled() -> None:
    assert find("aot_unpaired").coupled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ends(dtype: torch.dtype) -> None:
    _, _, (chosen, rejected) = at_the_ends(find("aot_unpaired"), AOTUnpairedConfig(), dtype=dtype)
    assert (chosen < 0).all() and (rejected > 0).all()


def test_beta_must_be_positive() -> None:
    with pytest.raises(UserError, match=r"^aot_unpaired: beta = 0: Input should be greater than 0$"):
        parse(AOTUnpairedConfig, {"beta": 0}, "aot_unpaired")
