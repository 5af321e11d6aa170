"""H-DPO against the paper's formula (there is no code of the authors), DPO, and numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from golden import close, golden
from random_statistics import random_statistics

from posttrain.objectives.preference.dpo import DPOConfig, dpo
from posttrain.objectives.preference.hdpo import HDPOConfig, hdpo
from posttrain.schema import UserError, parse
from posttrain.stats import Completions, Pairs


@pytest.mark.parametrize("file", ["hdpo_alpha0.9", "hdpo_alpha1.0"])
def test_paper_formula(file: str) -> None:
    paper = golden(file)
    pairs = with_entropy(paper.pairs())
    loss = hdpo(HDPOConfig(beta=paper.inputs["beta"], alpha=paper.inputs["alpha"]), pairs)
    close(loss.values, paper.outputs["per_example_losses"])
    close(loss.values.mean(), paper.outputs["loss"])
    close(loss.metrics["rewards/chosen"], paper.outputs["chosen_rewards"])
    close(loss.metrics["rewards/rejected"], paper.outputs["rejected_rewards"])
    loss.values.mean().backward()
    close(paper.policy_logits.grad, paper.outputs["grad_policy_logits"])


def test_alpha_1_is_dpo() -> None:
    pairs = random_statistics(Pairs, seed=3, want=("entropy",))
    close(hdpo(HDPOConfig(alpha=1), pairs).values, dpo(DPOConfig(), pairs).values.tolist(), 1e-12)


def test_by_hand() -> None:
    """beta 0.5, alpha 0.8. log policy -2 and -3, log reference -4 and -1.

    r_chosen = 0.5 * (-1.6 + 4) = 1.2, r_rejected = 0.5 * (-2.4 + 1) = -0.7, loss = log(1 + e^-1.9) = 0.139388...
    The length terms are 0.5 * -0.2 * -4 = 0.4 and 0.1; beta * alpha * h is 0.8 and -0.8, which with them gives the rewards.
    """
    pairs = with_entropy(Pairs(chosen=completion(-2.0, -4.0), rejected=completion(-3.0, -1.0)))
    loss = hdpo(HDPOConfig(beta=0.5, alpha=0.8), pairs)
    close(loss.values, [math.log1p(math.exp(-1.9))])
    close(loss.metrics["rewards/chosen"], [1.2])
    close(loss.metrics["rewards/rejected"], [-0.7])
    close(loss.metrics["length_term/chosen"], [0.4])
    close(loss.metrics["length_term/rejected"], [0.1])


def test_start_is_the_length_term() -> None:
    """Where the policy is the reference only the length terms are left."""
    pairs = with_entropy(Pairs(chosen=completion(-6.0, -6.0), rejected=completion(-2.0, -2.0)))
    close(hdpo(HDPOConfig(beta=0.5, alpha=0.9), pairs).values, [math.log1p(math.exp(-0.5 * 0.1 * 4))])


def test_alpha_must_be_positive() -> None:
    with pytest.raises(UserError, match=r"^objective: alpha = 0: Input should be greater than 0$"):
        parse(HDPOConfig, {"alpha": 0}, "objective")


def completion(logp: float, reference_logp: float) -> Completions:
    """One completion of one token."""
    return Completions(
        logps=torch.tensor([logp], dtype=torch.float64),
        lengths=torch.tensor([1]),
        reference_logps=torch.tensor([reference_logp], dtype=torch.float64),
    )


def with_entropy(pairs: Pairs) -> Pairs:
    """The same pairs with an entropy of 1 nat everywhere, which no loss reads."""
    for one in (pairs.chosen, pairs.rejected):
        one.more["entropy"] = torch.ones_like(one.logps)
    return pairs
