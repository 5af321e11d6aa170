"""CPO against TRL and numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from golden import close, golden
from hand import at_the_ends, completions

from posttrain.objectives.preference.cpo import CPOConfig, cpo
from posttrain.registry import find
from posttrain.schema import UserError, parse
from posttrain.stats import Pairs


def test_released_code() -> None:
    official = golden("baseline_cpo")
    config = CPOConfig(beta=official.inputs["beta"], alpha=official.inputs["cpo_alpha"])
    loss = cpo(config, official.pairs())
    close(loss.values, official.outputs["per_example_losses"])
    assert loss.plus is not None and loss.plus.per == "chosen"
    close(loss.plus.values.mean(), official.outputs["nll"])
    total = loss.values.mean() + loss.plus.values.mean()
    close(total, official.outputs["loss"])
    close(torch.autograd.grad(total, official.policy_logits)[0], official.outputs["grad_policy_logits"])
    for role in ("chosen", "rejected"):
        close(loss.metrics[f"rewards/{role}"], official.outputs[f"{role}_rewards"])


def test_the_nll_is_that_of_supervised_training() -> None:
    official = golden("baseline_trl_sft")
    term = cpo(CPOConfig(), official.pairs()).plus
    assert term is not None
    close(term.values.mean(), official.outputs["loss"])
    gradient = torch.autograd.grad(term.values.mean(), official.policy_logits)[0]
    close(gradient, official.outputs["grad_policy_logits"])


def test_by_hand() -> None:
    """beta 0.5: rewards 0.5 * -3 and 0.5 * -1, margin -1, loss log(1 + e); with the sum of the NLL, weighted 0.1, 0.3 more."""
    batch = Pairs(chosen=completions([[-1.0, -2.0]]), rejected=completions([[-1.0]]))
    close(cpo(CPOConfig(beta=0.5), batch).values, [math.log1p(math.e)])
    summed = cpo(CPOConfig(beta=0.5, alpha=0.1, nll="sum"), batch)
    assert summed.plus is None
    close(summed.values, [math.log1p(math.e) + 0.3])
    close(summed.metrics["nll/chosen"], [1.5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ends(dtype: torch.dtype) -> None:
    chosen, rejected, gradients = at_the_ends(find("cpo"), CPOConfig(), (0.0, -1.0, -30.0, -1000.0), dtype)
    out_of_order = chosen <= rejected
    assert (gradients[0][out_of_order] < 0).all() and (gradients[1][out_of_order] > 0).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alpha": -1}, "cpo: alpha = -1: Input should be greater than or equal to 0"),
        ({"nll": "rows"}, "cpo: nll = 'rows': Input should be 'tokens' or 'sum'"),
    ],
)
def test_refused_settings(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(CPOConfig, values, "cpo")
    assert str(error.value) == message
