"""IPO against the authors of DPO, TRL and numbers worked by hand."""

from __future__ import annotations

import pytest
import torch
from golden import close, golden

from posttrain.objectives.preference.ipo import IPOConfig, ipo
from posttrain.registry import find
from posttrain.schema import UserError, parse
from posttrain.stats import Completions, Pairs

IPO = find("ipo")


@pytest.mark.parametrize(("file", "normalised"), [("baseline_ipo_sum", False), ("baseline_trl_ipo", True)])
def test_released_code(file: str, normalised: bool) -> None:
    official = golden(file)
    official.agree(IPO, IPOConfig(beta=official.inputs["beta"], length_normalised=normalised))


def test_by_hand() -> None:
    """beta 1/4, so the target is 2. Chosen: log-ratios 0.5 + 1.5 = 2 over 4 tokens; rejected: -1 over 5 tokens.

    Sums: margin 3, loss (3 - 2)^2 = 1, rewards 0.5 and -0.25. Means: margin 0.5 + 0.2 = 0.7, loss (0.7 - 2)^2 = 1.69.
    """
    pairs = Pairs(chosen=completion([0.5, 1.5, 0.0, 0.0]), rejected=completion([-1.0, 0.0, 0.0, 0.0, 0.0]))
    sums = ipo(IPOConfig(beta=0.25), pairs)
    close(sums.values, [1.0])
    close(sums.metrics["rewards/chosen"], [0.5])
    close(sums.metrics["rewards/rejected"], [-0.25])
    close(ipo(IPOConfig(beta=0.25, length_normalised=True), pairs).values, [1.69])


def test_gradient_points_at_the_target() -> None:
    """Beyond the target the margin is pushed down: d loss / d h_chosen = 2 (margin - target)."""
    chosen = completion([5.0])
    ipo(IPOConfig(beta=0.25), Pairs(chosen=chosen, rejected=completion([0.0]))).values.sum().backward()
    close(chosen.logps.grad, [6.0])


def test_beta_must_be_positive() -> None:
    with pytest.raises(UserError, match=r"^objective: beta = 0: Input should be greater than 0$"):
        parse(IPOConfig, {"beta": 0}, "objective")


def completion(logratios: list[float]) -> Completions:
    """One completion whose tokens have these log-ratios."""
    logps = torch.tensor(logratios, dtype=torch.float64, requires_grad=True)
    return Completions(logps=logps, lengths=torch.tensor([len(logratios)]), reference_logps=torch.zeros_like(logps))
