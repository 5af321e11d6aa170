"""Estimates of the KL: their values, what they move, and the weight that adapts. Goldens run the authors' codes."""

from __future__ import annotations

import math

import pytest
import torch
from grids import read, same, tensor

from posttrain.importance import power
from posttrain.kl import ESTIMATES, IN_LOSS, adapted, in_loss

VALUES, EXPECTED = read("kl_estimators_values"), read("kl_estimators_expected_gradients")


@pytest.mark.parametrize("name", ["k1", "k2", "k3", "abs"])
def test_values_are_those_of_verl(name: str) -> None:
    d = tensor(VALUES["inputs"]["logprobs"]) - tensor(VALUES["inputs"]["ref_logprobs"])
    same(ESTIMATES[name](d), VALUES["outputs"][f"verl_{name}"])
    if name != "abs":
        same(ESTIMATES[name](d), VALUES["outputs"][f"openrlhf_{name}"], 1e-5)


@pytest.mark.parametrize("number", range(4))
def test_values_are_those_of_open_instruct(number: int) -> None:
    d = tensor(VALUES["inputs"]["logprobs"]) - tensor(VALUES["inputs"]["ref_logprobs"])
    ratio = tensor(VALUES["inputs"]["ratio_for_open_instruct"])
    ours = [d, ESTIMATES["k2"](d), ESTIMATES["k3"](d), ratio * d][number]
    same(ours, VALUES["outputs"]["open_instruct_estimate_kl_0_1_2_3"][number])


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_gradients_of_a_sample(name: str) -> None:
    logps = tensor(VALUES["inputs"]["logprobs"]).requires_grad_()
    ESTIMATES[name](logps - tensor(VALUES["inputs"]["ref_logprobs"])).sum().backward()
    same(logps.grad, VALUES["outputs"][f"grad_{name}_in_loss"])


def _expected(term: str) -> torch.Tensor:
    """[V] expected gradient of one token, in the logits of the policy that it is drawn from."""
    logits, reference = (tensor(EXPECTED["inputs"][name]) for name in ("logits", "ref_logits"))
    logits.requires_grad_()
    lp, lq = logits.log_softmax(-1), reference.log_softmax(-1)
    drawn, d, ratio = lp.detach().exp(), lp - lq, power(lp - lp.detach())
    match term:
        case "analytic":
            loss = (lp.exp() * d).sum()
        case "k1_in_reward":
            loss = (drawn * lp * d.detach()).sum()
        case "k3_in_reward":
            loss = (drawn * lp * ESTIMATES["k3"](d.detach())).sum()
        case "k1":
            loss = (drawn * d).sum()
        case _:
            loss = (drawn * in_loss(term, d, ratio)).sum()
    return torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize(
    ("term", "golden"),
    [
        ("analytic", "true_reverse_kl_grad"),
        ("k1", "k1_in_loss"),
        ("k2", "k2_in_loss"),
        ("k3", "k3_in_loss"),
        ("ratio_k3", "ratio_times_k3_differentiable"),
        ("k1_in_reward", "k1_in_reward_score_function"),
        ("k3_in_reward", "k3_in_reward_score_function"),
    ],
)
def test_expected_gradients_golden(term: str, golden: str) -> None:
    same(_expected(term), EXPECTED["outputs"]["gradients"][golden])


def test_what_is_said_of_terms_in_the_loss_is_so() -> None:
    truth = {
        "reverse KL at each token": EXPECTED["outputs"]["gradients"]["true_reverse_kl_grad"],
        "forward KL at each token": EXPECTED["outputs"]["gradients"]["true_forward_kl_grad"],
    }
    for term, said in IN_LOSS.items():
        same(_expected(term), truth[said])
    assert _expected("k1").abs().max() < 1e-15
    gap = _expected("k3_in_reward") - tensor(truth["reverse KL at each token"])
    assert gap.abs().max() > 0.5


def test_expected_values_golden() -> None:
    values = EXPECTED["outputs"]["values"]
    lp, lq = (tensor(EXPECTED["inputs"][name]).log_softmax(-1) for name in ("logits", "ref_logits"))
    for name in ("k1", "k2", "k3"):
        same((lp.exp() * ESTIMATES[name](lp - lq)).sum(), values[f"E_{name}"])
    assert values["E_k1"] == pytest.approx(values["kl_reverse"]) == pytest.approx(values["E_k3"])


def _sequences() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All 27 sequences of 3 tokens over 3 items under an autoregressive policy: [27, 3] log-probs of policy (with gradient to
    a leaf [13, 3], a row a prefix) and reference, and that leaf."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 13, 3, generator=generator, dtype=torch.float64)
    policy.requires_grad_()
    tokens = torch.cartesian_prod(*[torch.arange(3)] * 3)  # [27, 3]
    rows = torch.stack([torch.zeros(27, dtype=torch.int64), 1 + tokens[:, 0], 4 + 3 * tokens[:, 0] + tokens[:, 1]], 1)
    lp, lq = (logits.log_softmax(-1)[rows].gather(-1, tokens[..., None]).squeeze(-1) for logits in (policy, reference))
    analytic = (policy.softmax(-1) * (policy.log_softmax(-1) - reference.log_softmax(-1))).sum(-1)[rows]
    return lp, lq, policy, analytic


def _cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0).item()


def test_gradients_of_whole_sequences() -> None:
    """The last column of the table: what is exact, and what shares one and the same error."""
    lp, lq, policy, analytic = _sequences()
    p, d, reward = lp.sum(1).exp(), lp - lq, (lp - lq).detach()
    drawn = p.detach()[:, None]
    ratio = power(lp - lp.detach())

    def gradient(terms: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(terms.sum(), policy, retain_graph=True)[0]

    truth = gradient(p * d.sum(1))
    to_go = reward.flip(1).cumsum(1).flip(1)
    ahead = analytic.detach().flip(1).cumsum(1).flip(1)
    exact = {
        "k1 in the reward, whole return": drawn * lp * reward.sum(1, keepdim=True),
        "k1 in the reward, return to go": drawn * lp * to_go,
        "reward and loss, analytic, whole return": drawn * (analytic + lp * analytic.detach().sum(1, keepdim=True)),
        "reward and loss, analytic, return to go": drawn * (analytic + lp * ahead),
    }
    for name, terms in exact.items():
        torch.testing.assert_close(gradient(terms), truth, rtol=0, atol=1e-12, msg=name)
    biased = gradient(drawn * analytic)
    for name in ("k2", "ratio_k3"):
        torch.testing.assert_close(gradient(drawn * in_loss(name, d, ratio)), biased, rtol=0, atol=1e-12, msg=name)
    torch.testing.assert_close(gradient(drawn * lp * reward), biased, rtol=0, atol=1e-12)  # gamma 0
    forward = gradient(drawn * in_loss("k3", d, ratio))
    assert _cosine(biased, truth) < 0.9 and _cosine(forward, truth) < 0.9 and _cosine(forward, biased) < 0.9


def test_extremes_keep_value_and_gradient() -> None:
    """Nothing is infinite or silent where policy and reference are far apart, in float32."""
    d = torch.tensor([-1000.0, -50.0, 0.0, 50.0, 1000.0], requires_grad=True)
    for name in ("k2", "k3"):
        values = ESTIMATES[name](d)
        (gradient,) = torch.autograd.grad(values.sum(), d)
        assert (
            values.isfinite().all()
            and gradient.isfinite().all()
            and (gradient != 0).tolist() == [True, True, False, True, True]
        )
    x = torch.tensor([-1.0, 0.0, 19.0, 21.0], dtype=torch.float64, requires_grad=True)
    same(power(x), [math.exp(-1), 1.0, math.exp(19), 2 * math.exp(20)], 1e-6)
    same(power(x, minus_one=True), [math.exp(-1) - 1, 0.0, math.exp(19) - 1, 2 * math.exp(20) - 1], 1e-6)
    assert torch.autograd.gradcheck(power, x)


def test_adaptive_weight_golden() -> None:
    golden = read("ppo_adaptive_kl_controller")
    given, weight = golden["inputs"], golden["inputs"]["init"]
    for kl, expected in zip(given["kl_sequence"], golden["outputs"]["coefficient_after_each_update"], strict=True):
        weight = adapted(weight, kl, target=given["target"], horizon=given["horizon"], episodes=given["n_steps"])
        assert weight == pytest.approx(expected, abs=1e-12)
