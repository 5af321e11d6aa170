"""ToDi against its formula in numpy, numbers worked by hand, and the authors' gradient."""

from __future__ import annotations

import math

import numpy as np
import torch
from golden import close, tensor
from golden_taught import taught, taught_golden

from posttrain.objectives.distillation.todi import ToDiConfig, todi
from posttrain.registry import find

TODI = find("todi")


def test_formula() -> None:
    """Independently in numpy: s = p / (p + q), and per item dl/dz by finite differences with s held."""
    file = taught_golden("fkl_masked_mean")
    rows = file.taught(TODI.want(ToDiConfig()))
    losses = todi(ToDiConfig(), rows).values
    mask = file.mask.numpy()
    z_s, z_t = file.student.detach().numpy()[mask], file.teacher.numpy()[mask]

    def softmax(z: np.ndarray) -> np.ndarray:
        e = np.exp(z - z.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    p, q0 = softmax(z_t), softmax(z_s)
    s = p / (p + q0)

    def loss(z: np.ndarray) -> np.ndarray:
        q = softmax(z)
        return (s * p * np.log(p / q) + (1 - s) * q * np.log(q / p)).sum(-1)

    close(losses, loss(z_s).tolist(), 1e-12)
    (gradient,) = torch.autograd.grad(losses.sum(), file.student)
    step = 1e-6 * np.eye(z_s.shape[1])
    for v in range(z_s.shape[1]):
        finite = (loss(z_s + step[v]) - loss(z_s - step[v])) / 2e-6
        close(gradient[file.mask][:, v], finite.tolist(), 1e-8)


def test_by_hand() -> None:
    """q = (1/4, 3/4), p = (3/4, 1/4): s = (3/4, 1/4). 3/4 log 3 (3/4 - 1/4) for the first item:

    (s p - (1 - s) q) log(p / q) = (9/16 - 1/16) log 3 and (1/16 - 9/16) * -log 3, together log 3.
    """
    logits = tensor([0.25, 0.75]).log()[None].requires_grad_()
    loss = todi(ToDiConfig(), taught(logits, tensor([0.75, 0.25]).log()[None], torch.tensor([0]), TODI.want(ToDiConfig())))
    close(loss.values, [math.log(3)])


def test_slope_holds_the_share() -> None:
    (entry,) = TODI.want(ToDiConfig())
    lp, lq = (torch.randn(3, 9, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    leaf = lp.clone().requires_grad_()
    (derivative,) = torch.autograd.grad(entry.summand(leaf, lq).sum(), leaf)
    torch.testing.assert_close(entry.slope(lp, lq), derivative, rtol=0, atol=1e-14)


def test_equal_distributions_have_no_gradient() -> None:
    logits = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    loss = todi(ToDiConfig(), taught(logits, logits.detach(), torch.arange(4), TODI.want(ToDiConfig())))
    close(loss.values, [0.0] * 4, 1e-15)
    close(torch.autograd.grad(loss.values.sum(), logits)[0], torch.zeros(4, 9).tolist(), 1e-15)
