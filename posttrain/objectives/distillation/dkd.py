"""DKD: the KL in its two parts, whether the token is the data's and which other it is, each with a weight of its own.

    loss = T^2 (alpha KL(b || b') + beta KL(p' || q')),   b = (p_y, 1 - p_y),  b' = (q_y, 1 - q_y),   p teacher, q student

y is the token of the data; p' and q' are the distributions over the other items, renormalised; all at temperature T. KL(p ||
q) is the same with beta = 1 - p_y at each token: a sure teacher silences what it knows of the other items, which beta
undoes. The mean is over tokens.

Source: Zhao et al. 2022, "Decoupled Knowledge Distillation", arXiv:2203.08679, eq. 7. The port in TAID's code divides the
sum over the counted tokens by the number of all positions, padding included, and hides the token with a logit of -1000; here
it is left out.
Value at policy == reference: 0; with a cross-entropy term it depends on the data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...registry import objective
from ...schema import NonNegative, Positive
from ...stats import Loss, Rowwise, Taught, wide


@dataclass(frozen=True, kw_only=True)
class DKDConfig:
    """Settings of DKD."""

    alpha: NonNegative = 1.0
    """Weight of the part of the token."""

    beta: NonNegative = 0.5
    """Weight of the part of the other items; the paper's value for ImageNet, its largest data set."""

    temperature: Positive = 1.0
    """T, which divides the logits of both models."""

    temperature_squared: bool = True
    """The factor T^2, which keeps the size of the gradient as T grows."""

    ce_weight: NonNegative = 0.0
    """Weight of the cross-entropy of the data's tokens (1 in the paper)."""


def _split(logps: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[n, V] log-probs -> log-prob [n] of the tokens, of all others together [n], and of each other among them [n, V]."""
    column = tokens[:, None]
    others = logps.scatter(1, column, -torch.inf)
    rest = others.logsumexp(-1)
    return logps.gather(1, column).squeeze(1), rest, others - rest[:, None]


def _target(student: torch.Tensor, teacher: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    p, p_rest, _ = _split(teacher, tokens)
    q, q_rest, _ = _split(student, tokens)
    return p.exp() * (p - q) + p_rest.exp() * (p_rest - q_rest)


def _others(student: torch.Tensor, teacher: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    p, q = (_split(logps, tokens)[2] for logps in (teacher, student))
    ratio = (p - q).scatter(1, tokens[:, None], 0)  # not inf - inf
    return (p.exp() * ratio).sum(-1)


def _want(config: DKDConfig) -> tuple[Rowwise, Rowwise]:
    heat = config.temperature
    return (
        Rowwise(name="target_kl", f=_target, temperature=heat),
        Rowwise(name="others_kl", f=_others, temperature=heat),
    )


@objective(reference=True, want=_want, start=lambda config: 0.0 if config.ce_weight == 0 else None)
def dkd(config: DKDConfig, rows: Taught) -> Loss:
    target, others = wide(rows.completion["target_kl"]), wide(rows.completion["others_kl"])  # [N]
    scale = config.temperature**2 if config.temperature_squared else 1.0
    losses = scale * (config.alpha * target + config.beta * others) - config.ce_weight * wide(rows.completion.logps)  # [N]
    return Loss(losses, {"target_kl": target.detach(), "others_kl": others.detach()}, per="completion")
