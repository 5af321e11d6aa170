"""TAID: the target moves from the student's own distribution to the teacher's as the student learns.

    loss = KL(p_t || q),   p_t = softmax((1 - t) z_student + t z_teacher),   q student

p_t has no gradient. After each optimizer step, with its mean loss L and the one before it L':

    m <- beta m + (1 - beta) (L' - L) / L'
    t <- min(t_end, max(t_start + (t_end - t_start) progress, t + alpha sigmoid(m) (1 - t)))

so t runs ahead of a straight line while the loss falls. t, m and L' are kept in checkpoints, L is the mean over all tokens
of the step, and the mean of the loss is over tokens.

Source: Shing et al. 2025, "TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in Language
Models", arXiv:2501.16937, algorithm 1. The authors' code leaves the entropy of p_t out, a constant to the gradient but not
to the relative change of L, which it makes smaller and drags along with the entropy: `value: cross_entropy`. It updates t
after each micro-batch of each process from that one's loss alone, and does not keep its state in checkpoints.
Value at policy == reference: 0; as a cross-entropy, or with a cross-entropy term, it depends on the data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from ...registry import objective
from ...schema import NonNegative, Probability
from ...stats import Loss, Rowwise, Taught, wide


@dataclass(frozen=True, kw_only=True)
class TAIDConfig:
    """Settings of TAID."""

    t_start: Probability = 0.4
    """Share of the teacher in the target at the beginning."""

    t_end: Probability = 1.0
    """Share of the teacher at the end, and at most."""

    alpha: NonNegative = 5e-4
    """Largest step of t relative to what is left of it."""

    beta: Probability = 0.99
    """Weight of the past in m."""

    value: Literal["kl", "cross_entropy"] = "kl"
    """Whether the loss contains the entropy of the target (paper) or not (released code)."""

    ce_weight: NonNegative = 0.0
    """Weight of the cross-entropy of the data's tokens."""


def _kl(student: torch.Tensor, teacher: torch.Tensor, tokens: torch.Tensor, *, t: torch.Tensor) -> torch.Tensor:
    target = torch.lerp(student.detach(), teacher, t.to(student.dtype)).log_softmax(-1)  # [n, V]
    return (target.exp() * (target - student)).sum(-1)


def _cross_entropy(student: torch.Tensor, teacher: torch.Tensor, tokens: torch.Tensor, *, t: torch.Tensor) -> torch.Tensor:
    target = torch.lerp(student.detach(), teacher, t.to(student.dtype)).softmax(-1)  # [n, V]
    return -(target * student).sum(-1)


def _want(config: TAIDConfig) -> tuple[Rowwise]:
    f = _kl if config.value == "kl" else _cross_entropy
    return (Rowwise(name="taid", f=f, given=("t",), eager=True),)


def _state(config: TAIDConfig, context: Mapping[str, float], means: Mapping[str, float]) -> dict[str, float]:
    if not context:
        return {"t": config.t_start, "momentum": 0.0}
    loss, momentum, t = means["loss"], context["momentum"], context["t"]
    if "previous" in context:  # the first step has none, and leaves t as it is
        previous = context["previous"]
        momentum = config.beta * momentum + (1 - config.beta) * (previous - loss) / (previous + 1e-15)
        ahead = t + config.alpha * (1 + math.tanh(momentum / 2)) / 2 * (1 - t)  # tanh: a sigmoid that cannot overflow
        line = config.t_start + (config.t_end - config.t_start) * context["progress"]
        t = min(config.t_end, max(line, ahead))
    return {"t": t, "momentum": momentum, "previous": loss}


def _start(config: TAIDConfig) -> float | None:
    return 0.0 if config.value == "kl" and config.ce_weight == 0 else None


@objective(reference=True, want=_want, state=_state, start=_start)
def taid(config: TAIDConfig, rows: Taught) -> Loss:
    values = wide(rows.completion["taid"])  # [N]
    context = rows.context
    metrics = {"taid": values.detach(), "taid/t": context["t"], "taid/momentum": context["momentum"]}
    losses = values - config.ce_weight * wide(rows.completion.logps)  # [N]
    return Loss(losses, metrics, per="completion", remember={"loss": values.detach()})
