"""SinKD against released code, an independent formula, its own other gradients, and numbers worked by hand."""

from __future__ import annotations

import pytest
import torch
from golden import close, tensor
from golden_taught import taught, taught_golden

from posttrain.objectives.distillation.sinkd import SinKDConfig, implicit_gradient, sinkd, sinkhorn
from posttrain.registry import find

SINKD = find("sinkd")

ALONE = {"kd_weight": 0, "ce_weight": 0, "weight": 1}
"""The transport without its companions."""


def test_log_domain() -> None:
    file, config = (
        taught_golden("sinkd_logdomain_uniform_detached"),
        SinKDConfig(iterations=200, plan_gradient="detached", **ALONE),
    )
    loss = sinkd(config, file.taught(SINKD.want(config))).values.mean()
    close(loss, file.outputs["loss"])
    close(torch.autograd.grad(loss, file.student)[0], file.outputs["grad_student_logits"])


def released(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The authors' loss for [N, V] logits, not on logarithms: 20 times rows, then columns, of exp(-W / 0.1); times 0.001."""
    cost = torch.cdist((student / 2).softmax(-1), (teacher / 2).softmax(-1), p=1)
    plan = (-cost / 0.1).exp()
    for _ in range(20):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return 0.001 * (plan * cost).sum()


def test_released_constants() -> None:
    """Mass N, weight 0.001 and gradients through all iterations; the golden's value at mass 1 is N / 1000 times less."""
    file = taught_golden("sinkd_logdomain_uniform_detached")
    config = SinKDConfig(**{**ALONE, "weight": 0.001}, mass="rows")
    loss = sinkd(config, file.taught(SINKD.want(config))).values.mean()
    expected = released(file.student[file.mask], file.teacher[file.mask])
    close(loss, expected.item(), 1e-14)
    assert loss.item() == pytest.approx(0.01 * file.outputs["loss"], rel=1e-4)
    ours, theirs = (torch.autograd.grad(one, file.student)[0] for one in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


def test_what_is_released_for_language_models_is_another_loss() -> None:
    """Softmax over time, columns normalised over the batch: the golden's number, which no setting here gives."""
    file = taught_golden("sinkd_T0_asreleased_3d")
    student, teacher = ((logits / 2).softmax(1) for logits in (file.student, file.teacher))
    cost = torch.cdist(student, teacher, p=1)  # [B, T, T]
    plan = (-cost / 0.1).exp()
    for _ in range(20):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    loss = 0.0008 * (plan * cost).sum()
    close(loss, file.outputs["loss"])
    close(torch.autograd.grad(loss, file.student)[0], file.outputs["grad_student_logits"])
    config = SinKDConfig(**{**ALONE, "weight": 0.0008}, mass="rows")
    assert abs(sinkd(config, file.taught(SINKD.want(config))).values.mean().item() - file.outputs["loss"]) > 0.05


def test_by_hand() -> None:
    """Two tokens at which the models agree, (3/4, 1/4) and (1/4, 3/4) at temperature 1, so W = (0, 1; 1, 0).

    The plan is (1, x; x, 1) / (1 + x) with x = e^(-1 / eps), and each row pays x / (1 + x).
    """
    logits = tensor([[0.75, 0.25], [0.25, 0.75]]).log()
    config = SinKDConfig(**ALONE, temperature=1, eps=0.5)
    loss = sinkd(config, taught(logits, logits, torch.tensor([0, 1]), SINKD.want(config)))
    x = torch.tensor(-2.0, dtype=torch.float64).exp().item()
    close(loss.values, [x / (1 + x)] * 2)
    close(loss.metrics["plan/own"], [[1 / (1 + x)]] * 2)
    close(loss.metrics["cost/own"], [[0.0], [0.0]])
    close(loss.metrics["plan/error"], [0.0, 0.0], 1e-15)


def test_a_diagonal_plan_pays_twice_the_total_variation() -> None:
    """With eps so small that every row stays where it is: far on the other side there is nothing to gain."""
    logits = 9 * torch.eye(4, 23, dtype=torch.float64)
    near = logits + 0.3 * torch.randn(4, 23, dtype=torch.float64)
    config = SinKDConfig(**ALONE, eps=1e-3)
    rows = taught(near, logits, torch.arange(4), [*SINKD.want(config)])
    loss = sinkd(config, rows)
    close(loss.values, ((near / 2).softmax(-1) - (logits / 2).softmax(-1)).abs().sum(-1).tolist())
    close(loss.metrics["plan/own"].mean(), 1.0)


def test_implicit_gradient_is_that_of_the_converged_plan() -> None:
    cost = torch.rand(7, 7, dtype=torch.float64, requires_grad=True)
    plan = sinkhorn(cost, 0.3, 400)
    (unrolled,) = torch.autograd.grad((plan * cost).sum(), cost)
    torch.testing.assert_close(implicit_gradient(cost.detach(), plan.detach(), 0.3), unrolled, rtol=0, atol=1e-10)


def test_gradients_of_the_plan_differ_at_equal_value() -> None:
    file = taught_golden("sinkd_logdomain_uniform_detached")
    values, gradients = {}, {}
    for kind in ("unrolled", "implicit", "detached"):
        config = SinKDConfig(**ALONE, iterations=300, plan_gradient=kind)
        loss = sinkd(config, file.taught(SINKD.want(config))).values.mean()
        values[kind], (gradients[kind],) = loss.item(), torch.autograd.grad(loss, file.student)
    assert values["implicit"] == values["detached"] == pytest.approx(values["unrolled"], abs=1e-14)
    torch.testing.assert_close(gradients["implicit"], gradients["unrolled"], rtol=0, atol=1e-10)
    assert (gradients["detached"] - gradients["unrolled"]).norm() > 0.2 * gradients["unrolled"].norm()


@pytest.mark.parametrize("mass", ["one", "rows"])
def test_a_subset_stands_for_all(mass: str) -> None:
    """4 of 10 tokens: the mean over all 10 is the transport among the 4, and only they have a gradient."""
    file = taught_golden("sinkd_logdomain_uniform_detached")
    config = SinKDConfig(**ALONE, rows=4, mass=mass)
    rows = file.taught(SINKD.want(config))
    chosen = (rows.completion["cost_column"] >= 0).nonzero().squeeze(1)
    loss = sinkd(config, rows).values
    small = taught(
        file.student[file.mask][chosen], file.teacher[file.mask][chosen], torch.arange(4), SINKD.want(SinKDConfig(**ALONE))
    )
    expected = sinkd(SinKDConfig(**ALONE, mass=mass), small).values.mean()
    close(loss.mean(), expected.item(), 1e-14)
    (gradient,) = torch.autograd.grad(loss.sum(), file.student)
    moved = gradient[file.mask].abs().sum(-1).nonzero().squeeze(1)
    assert len(chosen) == 4 and torch.equal(moved, chosen)


@pytest.mark.parametrize("kind", ["unrolled", "implicit", "detached"])
def test_among_the_tokens_of_a_completion(kind: str) -> None:
    """Three completions in one batch are three transports of their own, weighted by their tokens, in value and gradient."""
    file = taught_golden("sinkd_logdomain_uniform_detached")
    config = SinKDConfig(**ALONE, among="completion", plan_gradient=kind)
    together = sinkd(config, file.taught(SINKD.want(config))).values.sum()
    alone = 0
    for student, teacher, mask in zip(file.student, file.teacher, file.mask, strict=True):
        rows = taught(student[mask], teacher[mask], torch.zeros(int(mask.sum()), dtype=torch.int64), SINKD.want(config))
        alone = alone + sinkd(SinKDConfig(**ALONE, plan_gradient=kind), rows).values.sum()
    close(together, alone.item(), 1e-12)
    ours, theirs = (torch.autograd.grad(one, file.student)[0] for one in (together, alone))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_the_three_terms() -> None:
    file = taught_golden("sinkd_logdomain_uniform_detached")
    rows = file.taught(SINKD.want(SinKDConfig()))
    loss = sinkd(SinKDConfig(), rows)
    one = rows.completion
    expected = 0.8 * loss.metrics["transport"] + 0.9 * one["forward_kl"] - 0.1 * one.logps
    close(loss.values, expected.tolist(), 1e-15)
    close(loss.metrics["plan/error"].max(), 0.0, 5e-3)  # rows are normalised before columns, so theirs are a little off
    close(
        loss.metrics["plan/entropy"],
        sinkhorn(one["cost"], 0.1, 20).mul(-1).xlogy(sinkhorn(one["cost"], 0.1, 20)).sum(0).tolist(),
    )


def test_small_eps_does_not_underflow() -> None:
    """exp(-2 / 0.001) is 0 in float32; on logarithms the plan is finite."""
    cost = torch.rand(5, 5) + 1
    plan = sinkhorn(cost, 1e-3, 50)
    assert plan.isfinite().all() and plan.sum(0) == pytest.approx(torch.ones(5), abs=1e-5)
