"""DPO against the authors' code, TRL, hand-worked numbers, and at the ends of the range."""

from __future__ import annotations

import math

import pytest
import torch
from golden import close, golden

from posttrain.divergences import DIVERGENCES, FAMILIES
from posttrain.objectives.preference.dpo import DPOConfig, dpo
from posttrain.registry import find
from posttrain.schema import UserError, parse
from posttrain.stats import Completions, Pairs

DPO = find("dpo")

LINKED = [
    *(name for name, entry in DIVERGENCES.items() if entry.link),
    *(f"{name}:0.3" for name, of in FAMILIES.items() if of(0.3).link),
]


def pairs(chosen: list[float], rejected: list[float], dtype: torch.dtype = torch.float64) -> Pairs:
    """One-token completions with these log-ratios; the reference stands at 0, which keeps them exact in any dtype."""

    def role(values: list[float]) -> Completions:
        return Completions(
            logps=torch.tensor(values, dtype=dtype, requires_grad=True),
            lengths=torch.ones(len(values), dtype=torch.int64),
            reference_logps=torch.zeros(len(values), dtype=dtype),
        )

    return Pairs(chosen=role(chosen), rejected=role(rejected))


@pytest.mark.parametrize(
    ("file", "divergence", "constant"),
    [
        ("fdpo_reverse_kl", "reverse_kl", 0.0),
        ("fdpo_forward_kl", "forward_kl", -1.0),
        ("fdpo_alpha0.3", "alpha:0.3", -1 / 0.3),
        ("fdpo_alpha_to_0", "alpha:0.0001", -1 / 0.0001),
        ("fdpo_alpha_to_1", "alpha:0.999999999", -1 / 0.999999999),
        ("baseline_dpo", "reverse_kl", 0.0),
    ],
)
def test_authors_code(file: str, divergence: str, constant: float) -> None:
    """`constant` is what the authors' f' keeps and ours drops: it cancels in the loss and shifts their logged rewards."""
    official = golden(file)
    loss = official.agree(DPO, DPOConfig(beta=official.inputs["beta"], divergence=divergence))
    for role in ("chosen", "rejected"):
        rewards = torch.tensor(official.outputs[f"{role}_rewards"], dtype=torch.float64) - official.inputs["beta"] * constant
        close(loss.metrics[f"rewards/{role}"], rewards.tolist())
    margins = loss.metrics["rewards/chosen"] - loss.metrics["rewards/rejected"]
    close(loss.metrics["rewards/margins"], margins.tolist(), 0)
    close(loss.metrics["rewards/accuracies"], (margins > 0).double().tolist(), 0)


@pytest.mark.parametrize(("file", "limit"), [("fdpo_alpha_to_0", "reverse_kl"), ("fdpo_alpha_to_1", "forward_kl")])
def test_alpha_limits(file: str, limit: str) -> None:
    official = golden(file)
    losses = dpo(DPOConfig(beta=official.inputs["beta"], divergence=limit), official.pairs()).values
    close(losses, official.outputs["limit_per_example_losses"])


def test_label_smoothing_is_the_authors_cdpo() -> None:
    official = golden("baseline_cdpo")
    config = DPOConfig(beta=official.inputs["beta"], label_smoothing=official.inputs["label_smoothing"])
    loss = official.agree(DPO, config)
    for role in ("chosen", "rejected"):
        close(loss.metrics[f"rewards/{role}"], official.outputs[f"{role}_rewards"])


@pytest.mark.parametrize(
    ("file", "divergence", "atol"),
    [
        ("baseline_trl_sigmoid", "reverse_kl", 1e-9),
        ("fdpo_trl_forward_kl", "forward_kl", 1e-9),
        ("fdpo_trl_js_divergence", "js", 1e-9),
        # TRL's alpha is 1 - ours, and its alpha branch refuses float64, so these numbers are float32's.
        ("fdpo_trl_alpha_divergence", "alpha:0.7", 1e-7),
    ],
)
def test_trl(file: str, divergence: str, atol: float) -> None:
    """TRL logs beta * h as the reward whatever the divergence, which is ours for reverse_kl only."""
    trl = golden(file)
    trl.agree(DPO, DPOConfig(beta=trl.inputs["beta"], divergence=divergence), atol=atol)
    raw = dpo(DPOConfig(beta=trl.inputs["beta"]), trl.pairs()).metrics
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        close(raw[name].mean(), trl.outputs["metrics"][name], 1e-6)  # TRL logs through float32


OTHERS = {"squared_hellinger": "squared_hellinger", "jeffreys": "jeffreys", "chi2_kl": "chi2_plus_kl"}
"""Our name -> the name in the golden file, of generators that the paper does not list."""


@pytest.mark.parametrize("divergence", [name for name in OTHERS if name in DIVERGENCES])
def test_other_generators(divergence: str) -> None:
    file = golden("fdpo_other_f")
    expected, beta = file.outputs[OTHERS[divergence]], file.inputs["beta"]
    loss = file.agree(DPO, DPOConfig(beta=beta, divergence=divergence), outputs=expected)
    at_one = 1.0 if divergence == "chi2_kl" else 0.0  # the file's f'(1)
    for role in ("chosen", "rejected"):
        f_prime = torch.tensor(expected[f"fprime_{role}"], dtype=torch.float64)
        close(loss.metrics[f"rewards/{role}"], (beta * (f_prime - at_one)).tolist())


@pytest.mark.parametrize(
    ("divergence", "reason"),
    [
        ("chi2", "0 is in the domain of f' (theorem 1); use chi2_kl"),
        ("total_variation", "f' is a step: not invertible, so no policy is its optimum"),
    ],
)
def test_invalid_divergences_are_refused(divergence: str, reason: str) -> None:
    with pytest.raises(UserError) as error:
        parse(DPOConfig, {"divergence": divergence}, "dpo")
    message = str(error.value)
    assert message.startswith(f"dpo: divergence = {divergence!r}: not defined for preference learning: {reason}. Possible: ")
    assert "\n" not in message
    assert f" {divergence}," not in message.partition("Possible:")[2]


def test_by_hand() -> None:
    """One pair of two chosen tokens and one rejected token, beta = 0.5.

    chosen:   policy -1 and -2, reference -1.5 and -2.5:  h = (-1 - 2) - (-1.5 - 2.5) = 1
    rejected: policy -4, reference -3:                    h = -1

    reverse_kl: s = h. Rewards .5 and -.5, m = 1, loss = log(1 + e^-1) = 0.3132616875.
    forward_kl: s = 1 - e^-h. s(1) = 0.6321205588, s(-1) = -1.7182818285; m = .5 * 2.3504023873 = 1.1752011936,
        loss = log(1 + e^-1.1752011936) = 0.2690777199.
    Each chosen token has d loss / d logp = -beta * sigmoid(-m) * ds/dh: reverse_kl -.5 * 0.2689414214 = -0.1344707107.
    """
    chosen = Completions(
        logps=torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True),
        lengths=torch.tensor([2]),
        reference_logps=torch.tensor([-1.5, -2.5], dtype=torch.float64),
    )
    rejected = Completions(
        logps=torch.tensor([-4.0], dtype=torch.float64, requires_grad=True),
        lengths=torch.tensor([1]),
        reference_logps=torch.tensor([-3.0], dtype=torch.float64),
    )
    pair = Pairs(chosen=chosen, rejected=rejected)
    plain = dpo(DPOConfig(beta=0.5), pair)
    close(plain.values, [0.3132616875])
    close(plain.metrics["rewards/chosen"], [0.5])
    close(plain.metrics["rewards/rejected"], [-0.5])
    close(plain.metrics["rewards/accuracies"], [1.0])
    gradients = torch.autograd.grad(plain.values.sum(), [chosen.logps, rejected.logps])
    close(gradients[0], [-0.1344707107, -0.1344707107])
    close(gradients[1], [0.1344707107])
    close(dpo(DPOConfig(beta=0.5, divergence="forward_kl"), pair).values, [0.2690777199])


def test_a_tie_counts_half() -> None:
    close(dpo(DPOConfig(), pairs([0.0, 1.0, -1.0], [0.0, 0.0, 0.0])).metrics["rewards/accuracies"], [0.5, 1.0, 0.0])


@pytest.mark.parametrize("divergence", LINKED)
def test_start_is_log_2_with_rewards_0(divergence: str) -> None:
    loss = dpo(DPOConfig(divergence=divergence, label_smoothing=0.2), pairs([0.0], [0.0]))
    close(loss.values, [math.log(2)], 1e-12)
    close(loss.metrics["rewards/chosen"], [0.0], 1e-12)
    close(loss.metrics["rewards/rejected"], [0.0], 1e-12)


EXTREMES = [-1000.0, -1001.0, -512.0, -30.0, 0.0, 30.0, 512.0, 1000.0, 1001.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", LINKED)
def test_extreme_log_ratios(divergence: str, dtype: torch.dtype) -> None:
    """Every loss and gradient is finite; where the pair is not already in order, no gradient is 0."""
    chosen = [c for c in EXTREMES for _ in EXTREMES]
    rejected = EXTREMES * len(EXTREMES)
    batch = pairs(chosen, rejected, dtype)
    loss = dpo(DPOConfig(divergence=divergence), batch)
    gradients = torch.autograd.grad(loss.values.sum(), [batch.chosen.logps, batch.rejected.logps])
    assert loss.values.dtype == torch.float32 and loss.values.isfinite().all()
    assert all(metric.isfinite().all() for metric in loss.metrics.values())
    out_of_order = torch.tensor(chosen) <= torch.tensor(rejected)
    for gradient, sign in zip(gradients, (-1, 1), strict=True):
        assert gradient.isfinite().all()
        assert (sign * gradient[out_of_order] > 0).all()


def test_share_of_continued_completions() -> None:
    metrics = dpo(DPOConfig(), pairs([0.0, 20.0, 20.1, -1000.0], [0.0, -20.0, 0.0, 1000.0])).metrics
    close(metrics["divergence/continued"], [0.0, 0.0, 0.5, 1.0], 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beta": 0}, "dpo: beta = 0: Input should be greater than 0"),
        ({"beta": -0.1}, "dpo: beta = -0.1: Input should be greater than 0"),
        ({"label_smoothing": 1.5}, "dpo: label_smoothing = 1.5: Input should be less than or equal to 1"),
        (
            {"divergence": "alpha:1"},
            "dpo: divergence = 'alpha:1': alpha takes its parameter after a colon, 0 < a < 1, for example alpha:0.5",
        ),
        (
            {"divergence": "alpha"},
            "dpo: divergence = 'alpha': alpha takes its parameter after a colon, 0 < a < 1, for example alpha:0.5",
        ),
    ],
)
def test_refused_settings(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(DPOConfig, values, "dpo")
    assert str(error.value) == message
