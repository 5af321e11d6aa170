"""TAID against its formulas in numpy, the released form, and numbers worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from golden import close, tensor
from golden_taught import taught_golden

from posttrain.objectives.distillation.taid import TAIDConfig, taid
from posttrain.registry import find
from posttrain.stats import Taught, bound

TAID = find("taid")


def at(config: TAIDConfig, t: float) -> tuple[Taught, torch.Tensor]:
    """The golden batch at this t, and its student logits."""
    context = {"t": torch.tensor(t, dtype=torch.float64), "momentum": torch.tensor(0.0)}
    file = taught_golden("fkl_masked_mean")
    rows = file.taught(bound(TAID.want(config), context))
    return Taught(completion=rows.completion, context=context), file.student


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_formula(t: float) -> None:
    """Independently in numpy; the gradient of the mean is (q - p_t) / N in both forms."""
    file = taught_golden("fkl_masked_mean")
    mask = file.mask.numpy()
    z_s, z_t = file.student.detach().numpy()[mask], file.teacher.numpy()[mask]
    target, q = softmax((1 - t) * z_s + t * z_t), softmax(z_s)
    for value, expected in (("kl", target * np.log(target / q)), ("cross_entropy", -target * np.log(q))):
        config = TAIDConfig(value=value)
        rows, student = at(config, t)
        losses = taid(config, rows).values
        close(losses, expected.sum(-1).tolist(), 1e-12)
        (gradient,) = torch.autograd.grad(losses.mean(), student)
        close(gradient[file.mask], ((q - target) / len(q)).tolist(), 1e-12)


def test_at_the_end_it_is_the_forward_kl() -> None:
    """t = 1: the golden of the forward KL, in value and gradient."""
    file = taught_golden("fkl_masked_mean")
    rows, student = at(TAIDConfig(), 1.0)
    loss = taid(TAIDConfig(), rows).values.mean()
    close(loss, file.outputs["loss"])
    close(torch.autograd.grad(loss, student)[0], file.outputs["grad_student_logits"])


def test_gradient_by_finite_differences() -> None:
    """With the target held, as it has no gradient."""
    file, t = taught_golden("fkl_masked_mean"), 0.4
    rows, student = at(TAIDConfig(), t)
    (gradient,) = torch.autograd.grad(taid(TAIDConfig(), rows).values.sum(), student)
    z_s, z_t = (side.detach()[file.mask].numpy() for side in (file.student, file.teacher))
    target = softmax((1 - t) * z_s + t * z_t)
    loss = lambda z: (target * np.log(target / softmax(z))).sum(-1)  # noqa: E731
    step = 1e-6 * np.eye(z_s.shape[1])
    for v in (0, 7, 22):
        close(gradient[file.mask][:, v], ((loss(z_s + step[v]) - loss(z_s - step[v])) / 2e-6).tolist(), 1e-8)


def states(config: TAIDConfig, losses: list[float]) -> list[dict[str, float]]:
    """The state before the first step and after each step with this mean loss."""
    found = [TAID.state(config, {}, {})]
    for i, loss in enumerate(losses, 1):
        context = {**found[-1], "progress": i / len(losses), "loss": 0.0}
        found.append(TAID.state(config, context, {"loss": loss}))
    return found


def test_the_schedule_by_hand() -> None:
    """beta 1/2, alpha 1: losses 2, 1, 1 give relative changes 1/2 and 0, so m = 1/4 and 1/8; the first only sets the scale."""
    first, second, third, fourth = states(TAIDConfig(t_start=0.1, alpha=1, beta=0.5, t_end=0.9), [2.0, 1.0, 1.0])
    assert first == {"t": 0.1, "momentum": 0.0}
    assert second == {"t": 0.1, "momentum": 0.0, "previous": 2.0}
    ahead = 0.1 + 0.9 / (1 + math.exp(-0.25))
    assert third == pytest.approx({"t": max(0.1 + 0.8 * 2 / 3, ahead), "momentum": 0.25, "previous": 1.0})
    assert fourth == pytest.approx({"t": 0.9, "momentum": 0.125, "previous": 1.0})


def test_t_is_never_behind_the_line_and_never_falls() -> None:
    """With the paper's alpha the line leads; a rising loss slows the rest down, but t does not turn back."""
    ts = [state["t"] for state in states(TAIDConfig(), [3.0, 2.0, 5.0, 4.0, 4.5, 1.0])]
    assert ts == sorted(ts) and ts[-1] == 1.0
    assert all(t >= 0.4 + 0.6 * i / 6 for i, t in enumerate(ts[2:], 2))


def test_a_loss_of_zero_is_no_division_by_zero() -> None:
    assert all(math.isfinite(state["t"]) for state in states(TAIDConfig(), [0.0, 0.0, 1.0, 0.0]))


def test_what_is_remembered_is_the_loss() -> None:
    rows, _ = at(TAIDConfig(), 0.4)
    loss = taid(TAIDConfig(ce_weight=1.0), rows)
    close(loss.remember["loss"], rows.completion["taid"].tolist())
    assert not loss.remember["loss"].requires_grad
    close(loss.values, (rows.completion["taid"] - rows.completion.logps).tolist())
    assert loss.metrics["taid/t"] == tensor(0.4)
