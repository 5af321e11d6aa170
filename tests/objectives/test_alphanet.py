"""AlphaNet against the authors' code and numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from golden import close, tensor
from golden_taught import taught, taught_golden

from posttrain.objectives.distillation.alphanet import AlphaNetConfig, alphanet
from posttrain.registry import find

ALPHANET = find("alphanet")


def test_authors_code() -> None:
    """Both divergences and the gradient; the loss is the larger divergence, where theirs is a surrogate."""
    file = taught_golden("alphanet_adaptive")
    loss = alphanet(AlphaNetConfig(), file.taught(ALPHANET.want(AlphaNetConfig())))
    left, right = file.outputs["divergence_left"], file.outputs["divergence_right"]
    close(loss.metrics["divergence/low"], left)
    close(loss.metrics["divergence/high"], right)
    close(loss.values, [max(pair) for pair in zip(left, right, strict=True)])
    (gradient,) = torch.autograd.grad(loss.values.mean(), file.student)
    close(gradient, file.outputs["grad_student_logits"])


def test_their_surrogate() -> None:
    """-sum_v q_v rho log q_v with q, r constant, rho = r^a / a + 1 / (a (a - 1)), of the larger divergence."""
    file = taught_golden("alphanet_adaptive")
    lq, lp = file.student[file.mask].log_softmax(-1).detach(), file.teacher[file.mask].log_softmax(-1)
    low = -(lq.exp() * (0.5 - (lq - lp).exp().clamp(max=5)) * lq).sum(-1)
    high = -(lp.exp() * lq).sum(-1)
    left, right = (tensor(file.outputs[f"divergence_{side}"]) for side in ("left", "right"))
    close(torch.where(left > right, low, high).mean(), file.outputs["loss"])


def values(config: AlphaNetConfig, student: list[float], teacher: list[float]) -> torch.Tensor:
    rows = taught(tensor(student).log()[None], tensor(teacher).log()[None], torch.tensor([0]), ALPHANET.want(config))
    return alphanet(config, rows).values


def test_by_hand() -> None:
    """q = (1/4, 3/4), p = (1/2, 1/2): D_-1 = (sum q^2 / p - 1) / 2 = (1/8 + 9/8 - 1) / 2 = 1/8, D_1 = log(4/3) / 2."""
    close(values(AlphaNetConfig(), [0.25, 0.75], [0.5, 0.5]), [math.log(4 / 3) / 2])
    close(values(AlphaNetConfig(alpha_max=-1), [0.25, 0.75], [0.5, 0.5]), [1 / 8])
    close(values(AlphaNetConfig(clip=1.2, alpha_max=-1), [0.25, 0.75], [0.5, 0.5]), [(1 / 8 + 0.75 * 1.2 - 1) / 2])


@pytest.mark.parametrize(("a", "kl"), [(0.0, 1), (1.0, 0)])
def test_the_kls_are_its_limits(a: float, kl: int) -> None:
    sides = [0.25, 0.75], [0.4, 0.6]
    exact = [tensor(sides[kl - 1]), tensor(sides[kl])]
    near, at = (values(AlphaNetConfig(alpha_min=x, alpha_max=x), *sides) for x in (a + 1e-6, a))
    close(near, at.tolist(), 1e-6)
    close(at, [float((exact[0] * (exact[0] / exact[1]).log()).sum())])


def test_extremes() -> None:
    logits = tensor([[800.0, 0.0]]).requires_grad_()
    rows = taught(logits, tensor([[0.0, 800.0]]), torch.tensor([0]), ALPHANET.want(AlphaNetConfig()))
    loss = alphanet(AlphaNetConfig(), rows).values
    close(loss, [800.0])
    assert torch.autograd.grad(loss.sum(), logits)[0].isfinite().all()
