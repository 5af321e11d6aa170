"""f-DPG: f' and a loss from an independent formula, the gradient of D_f, enumerated; RLOO; what the lesson says."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from grids import read, same, tensor

from posttrain.divergences import FAMILIES, choices, divergence
from posttrain.experience import Experience
from posttrain.objectives.online.fdpg import FDPGConfig, Targeted
from posttrain.registry import find
from posttrain.schema import UserError, parse
from posttrain.stats import Completions

FDPG, RLHF = find("fdpg"), find("rlhf")

GOLDEN = read("fdpg_pseudo_rewards")

AT_ONE = {"kl_forward_p_to_pi": -1.0, "reverse_kl_pi_to_p": 1.0}
"""f'(1) in the file, where it is not 0."""

OURS = {
    "kl_forward_p_to_pi": divergence("forward_kl"),
    "reverse_kl_pi_to_p": divergence("reverse_kl"),
    "js": divergence("js"),
    "tv": divergence("total_variation"),
    "neyman_chi2_pi_p": divergence("chi2"),
}


def test_every_slope_of_the_file() -> None:
    log_t = tensor(GOLDEN["inputs"]["log_t"])
    wanted = GOLDEN["outputs"]["f_prime"]
    for name, entry in OURS.items():
        same(entry.derivative(log_t) + AT_ONE.get(name, 0.0), wanted[name], 1e-12)
    same(2 * FAMILIES["alpha"](2.0).derivative(log_t), wanted["chi2_p_pi"], 1e-12)
    assert wanted.keys() == OURS.keys() | {"chi2_p_pi"}


def test_the_loss_of_the_file() -> None:
    """Completions of one token, without baselines; the file divides the gradient by their number."""
    inputs, outputs = GOLDEN["inputs"], GOLDEN["outputs"]
    logps = tensor(inputs["policy_log_probs"]).requires_grad_()
    zeros = torch.zeros_like(logps)
    sampled = Targeted(
        completion=Completions(logps=logps, lengths=torch.ones(6, dtype=torch.int64)),
        engine_logps=tensor(inputs["proposal_log_probs"]),
        target_logps=logps.detach() - tensor(inputs["log_t"]),
        baselines=zeros,
    )
    loss = FDPG(FDPGConfig(), sampled)
    assert loss.per == "row"
    same(loss.values.mean(), outputs["loss_js_no_baseline"], 1e-12)
    same(torch.autograd.grad(loss.values.mean(), logps)[0], outputs["grad_weight_js"], 1e-12)
    same(loss.metrics["rewards"], [-value for value in outputs["f_prime"]["js"]], 1e-12)


def round_of(scores: torch.Tensor, old: torch.Tensor, reference: torch.Tensor) -> Experience:
    """Completions of one token, all of one prompt."""
    ones, logps = torch.ones(len(scores), dtype=torch.int64), {"old_logps": old, "reference_logps": reference}
    return Experience(scores=scores, lengths=ones, group=len(scores), finished=ones.bool(), **logps)


@pytest.mark.parametrize("name", [*(one.replace("<a>", "0.3").replace("<b>", "0.3") for one in choices())])
def test_the_gradient_is_that_of_the_divergence(name: str) -> None:
    """A world of five responses: the expected loss, with the true Z and no baseline, against D_f(policy || p) by autograd."""
    if name.startswith("skew_reverse_kl_detached"):
        with pytest.raises(UserError, match="not that of an f-divergence"):
            parse(FDPGConfig, {"divergence": name}, "objective")
        return
    torch.manual_seed(0)
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    reference, scores = torch.randn(5, dtype=torch.float64).log_softmax(-1), torch.randn(5, dtype=torch.float64)
    p = (reference + scores / 0.5).log_softmax(-1)
    logps = logits.log_softmax(-1)
    (wanted,) = torch.autograd.grad(divergence(name).summand(logps, p).sum(), logits, retain_graph=True)
    one = Completions(logps=logps, lengths=torch.ones(5, dtype=torch.int64))
    q = torch.full_like(p, -math.log(5))
    sampled = Targeted(completion=one, engine_logps=q, target_logps=p, baselines=torch.zeros_like(p))
    loss = FDPG(FDPGConfig(divergence=name, beta=0.5), sampled)
    same(torch.autograd.grad(loss.values.mean(), logits)[0], wanted.tolist(), 1e-12)


def test_under_reverse_kl_it_is_rloo() -> None:
    """With the KL in the reward; f-DPG's rewards are those by beta."""
    torch.manual_seed(1)
    old, reference = (torch.randn(4, dtype=torch.float64) - 2 for _ in range(2))
    seen = round_of(torch.randn(4, dtype=torch.float64), old, reference)
    logps = old.clone().requires_grad_()
    one = Completions(logps=logps, lengths=seen.lengths, reference_logps=reference, more={"entropy": torch.zeros_like(old)})
    slopes = []
    for objective, settings in ((FDPG, {"divergence": "reverse_kl"}), (RLHF, {})):
        config = objective.config(beta=0.3, **settings)
        sampled = objective.family(completion=one, **objective.lesson(config, seen).tokens)
        slopes.append(torch.autograd.grad(objective(config, sampled).values.sum(), logps)[0])
    same(0.3 * slopes[0], slopes[1].tolist(), 1e-12)


def test_what_the_lesson_says() -> None:
    """By hand: two completions of one token each, policy 1/2 and 1/4, reference 1/4 and 1/2, rewards 0 and log 2 at beta 1.
    p Z is 1/4 and 1, its quotients with the policy 1/2 and 4, their mean 9/4, so t is 9/2 and 9/16."""
    old, reference = tensor([0.5, 0.25]).log(), tensor([0.25, 0.5]).log()
    seen = round_of(tensor([0.0, math.log(2)]), old, reference)
    lesson = FDPG.lesson(FDPGConfig(beta=1.0, divergence="forward_kl"), seen)
    assert lesson.keep.all()
    same(lesson.metrics["target/log_z"].exp(), [9 / 4], 1e-12)
    same(lesson.metrics["target/kl"].exp(), [9 / 2, 9 / 16], 1e-12)
    same(lesson.tokens["target_logps"].exp(), [1 / 9, 4 / 9], 1e-12)
    same(lesson.tokens["baselines"], [1 - 16 / 9, 1 - 2 / 9], 1e-12)  # that of the other, f' being 1 - 1 / t
    same(lesson.tokens["engine_logps"], old.tolist(), 0)
    away = dataclasses.replace(seen, engine_logps=tensor([0.25, 0.25]).log())
    away = FDPG.lesson(FDPGConfig(beta=1.0, divergence="forward_kl"), away)
    same(away.metrics["target/log_z"].exp(), [(1 + 4) / 2], 1e-12)
    same(away.tokens["engine_logps"].exp(), [0.25, 0.25], 1e-12)


def test_longer_completions_have_their_target_once() -> None:
    old, reference = tensor([-1.0, -2.0, -0.5]), tensor([-1.5, -1.0, -0.25])
    one = round_of(tensor([1.0, 0.0]), old, reference)
    seen = dataclasses.replace(one, lengths=torch.tensor([2, 1]))
    tokens = FDPG.lesson(FDPGConfig(beta=2.0), seen).tokens
    log_z = tensor([-2.5 + 0.5 + 3.0, -0.25 + 0.5]).logsumexp(0) - math.log(2)
    whole = torch.stack([tokens["target_logps"][:2].sum(), tokens["target_logps"][2]])
    same(whole, [(-2.0 - log_z).item(), (-0.25 - log_z).item()], 1e-12)


def test_at_the_target_nothing_is_learned() -> None:
    """Whatever is sampled: Z is exact there, and f' is 0 (but for total variation's, a step there)."""
    torch.manual_seed(2)
    reference, scores = torch.randn(6, dtype=torch.float64) - 3, torch.randn(6, dtype=torch.float64)
    at = reference + scores / 0.2 - 1.7
    for name in ("js", "forward_kl", "chi2"):
        lesson = FDPG.lesson(FDPGConfig(beta=0.2, divergence=name), round_of(scores, at, reference))
        assert lesson.tokens["baselines"].abs().max() < 1e-12 and lesson.metrics["target/kl"].abs().max() < 1e-12
        same(lesson.metrics["target/log_z"], [1.7], 1e-12)


def test_far_from_the_target_nothing_overflows() -> None:
    """Log-ratios of a thousand nats, in float32, with and without a link; the metric says that f' was continued or held."""
    seen = round_of(torch.tensor([100.0, -100.0, 0.0]), torch.full((3,), -4.0), torch.full((3,), -5.0))
    one = Completions(logps=torch.full((3,), -4.0, requires_grad=True), lengths=seen.lengths)
    for name in ("js", "forward_kl", "reverse_kl", "chi2", "jeffreys", "skew_kl:0.1", "total_variation"):
        config = FDPGConfig(divergence=name)
        loss = FDPG(config, Targeted(completion=one, **FDPG.lesson(config, seen).tokens))
        (gradient,) = torch.autograd.grad(loss.values.sum(), one.logps)
        assert loss.values.isfinite().all() and gradient.isfinite().all(), name
        assert gradient[0] < 0 < gradient[1], name
        assert loss.metrics["divergence/continued"].sum() == 2, name


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(UserError, match="group_size = 1: Z is a mean"):
        FDPG.lesson(FDPGConfig(), round_of(tensor([0.0]), tensor([-1.0]), tensor([-1.0])))
