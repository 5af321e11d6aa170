"""TDPO against the authors' code and numbers worked by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from golden import close, golden, tensor
from hand import completions, slopes

from posttrain.objectives.preference.tdpo import TDPOConfig, tdpo
from posttrain.recipe import load_run
from posttrain.references import kind_of
from posttrain.registry import find
from posttrain.schema import UserError, parse
from posttrain.stats import Completions, Pairs

TDPO = find("tdpo")


def test_authors_code() -> None:
    official = golden("tdpo1")
    loss = official.agree(TDPO, TDPOConfig(beta=official.inputs["beta"], version=1))
    for role in ("chosen", "rejected"):
        close(loss.metrics[f"kl/{role}"], official.outputs[f"seq_kl_{role}"])
        close(loss.metrics[f"rewards/{role}"], official.outputs[f"{role}_rewards"])


def test_by_hand() -> None:
    """beta 0.5; log-ratios 1 and -1, KLs 0.4 and 0.8.

    Version 1: rewards 0.7 and -0.1. Version 2, alpha 0.5: 0.5 * (1 + 0.2) = 0.6 and 0.5 * (-1 + 0.4) = -0.3.
    """
    for version, chosen, rejected in ((1, 0.7, -0.1), (2, 0.6, -0.3)):
        loss = tdpo(TDPOConfig(beta=0.5, version=version), pairs())
        close(loss.metrics["rewards/chosen"], [chosen])
        close(loss.metrics["rewards/rejected"], [rejected])
        close(loss.values, [math.log1p(math.exp(rejected - chosen))])


def test_version_2_holds_the_chosen_kl() -> None:
    """Its gradient is beta * alpha * sigmoid(-margin) on the rejected side and nothing on the chosen one."""
    batch = pairs()
    tdpo(TDPOConfig(beta=0.5), batch).values.sum().backward()
    assert batch.chosen["forward_kl"].grad is None
    close(batch.rejected["forward_kl"].grad, [0.25 / (1 + math.exp(0.9))])


def test_version_2_on_the_statistics_of_the_authors_code() -> None:
    """With alpha 1 its values and its gradient on the rejected side are those of version 1. On the chosen side, without the KL,
    it is -beta * sigmoid(-margin) * (1[v = y_t] - p_v) at each token."""
    official = golden("tdpo1")
    beta, half = official.inputs["beta"], len(official.policy_logits) // 2
    loss = tdpo(TDPOConfig(beta=beta, version=2, alpha=1.0), official.pairs(["forward_kl"]))
    close(loss.values, official.outputs["per_example_losses"])
    (gradient,) = torch.autograd.grad(loss.values.mean(), official.policy_logits)
    close(gradient[half:], official.outputs["grad_policy_logits"][half:])
    p = official.policy_logits[:half, :-1].softmax(-1)
    one = torch.nn.functional.one_hot(official.targets[:half], p.shape[-1])
    slope = -beta * torch.sigmoid(-loss.metrics["rewards/margins"])[:, None, None] * (one - p) / half
    close(gradient[:half, :-1], (slope * official.mask[:half, :, None]).tolist())
    assert (gradient[:half] - tensor(official.outputs["grad_policy_logits"][:half])).abs().max() > 1e-3


def test_version_2_by_hand_over_tokens() -> None:
    """beta 0.5, alpha 0.25. Pair 1: h = 3 over two tokens, K = 0.6, beside h = -1, K = 0.4: rewards 0.5 * 3.15 and 0.5 * -0.9.

    Pair 2: h = 0.5, K = 1, beside h = 2 over two tokens, K = 2: rewards 0.5 * 0.75 and 0.5 * 2.5. The slope of a chosen token
    is -beta * sigmoid(-margin), of a rejected one the negative of it.
    """
    chosen = dataclasses.replace(completions([[1.0, 2.0], [0.5]]), more={"forward_kl": tensor([0.2, 0.4, 1.0])})
    rejected = dataclasses.replace(completions([[-1.0], [1.5, 0.5]]), more={"forward_kl": tensor([0.4, 0.5, 1.5])})
    batch = Pairs(chosen=chosen, rejected=rejected)
    loss = tdpo(TDPOConfig(beta=0.5, alpha=0.25), batch)
    close(loss.metrics["rewards/chosen"], [1.575, 0.375])
    close(loss.metrics["rewards/rejected"], [-0.45, 1.25])
    close(loss.values, [math.log1p(math.exp(-2.025)), math.log1p(math.exp(0.875))])
    first, second = 0.5 / (1 + math.exp(2.025)), 0.5 / (1 + math.exp(-0.875))
    ours, theirs = slopes(loss, batch)
    close(ours, [-first, -first, -second])
    close(theirs, [first, second, second])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"version": 3}, "objective: version = 3: Input should be 1 or 2"),
        ({"alpha": -1}, "objective: alpha = -1: Input should be greater than or equal to 0"),
    ],
)
def test_refusals(values: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(TDPOConfig, values, "objective")
    assert str(error.value) == message


def test_cached_log_probs_are_refused() -> None:
    run = load_run("tdpo", overrides=["model=policy", "data=pairs.jsonl", "reference=cached"])
    with pytest.raises(UserError, match=r"^reference.kind = 'cached': tdpo reads the reference over the whole vocabulary"):
        kind_of(run)


def pairs() -> Pairs:
    """One pair of one-token completions: log-ratios 1 and -1, forward KLs 0.4 and 0.8."""

    def one(logratio: float, kl: float) -> Completions:
        number = lambda value: torch.tensor([value], dtype=torch.float64)  # noqa: E731
        return Completions(
            logps=number(logratio).requires_grad_(),
            lengths=torch.tensor([1]),
            reference_logps=number(0.0),
            more={"forward_kl": number(kl).requires_grad_()},
        )

    return Pairs(chosen=one(1.0, 0.4), rejected=one(-1.0, 0.8))
