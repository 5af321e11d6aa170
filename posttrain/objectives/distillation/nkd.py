"""NKD: the target by its cross-entropy under the teacher's confidence, the rest by a cross-entropy of their own.

    loss = CE + -p_y log q_y - gamma T^2 sum_{v != y} p'_v log q'_v,   p teacher, q student

y is the token of the data; p_y and q_y are at temperature 1; p' and q' are the distributions over the other items at
temperature T, each renormalised without y. The teacher's entropy is not subtracted. CE = -log q_y has the weight
`ce_weight`. The mean is over tokens.

Source: Yang et al. 2023, "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized
Loss and Customized Soft Labels", arXiv:2303.13005; the authors' code agrees.
Value at policy == reference: depends on the data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...registry import objective
from ...schema import NonNegative, Positive
from ...stats import Loss, Rowwise, Taught, wide


@dataclass(frozen=True, kw_only=True)
class NKDConfig:
    """Settings of NKD."""

    gamma: NonNegative = 1.5
    """Weight of the items other than the token."""

    temperature: Positive = 1.0
    """T, of the distributions over the other items."""

    ce_weight: NonNegative = 1.0
    """Weight of the cross-entropy of the data's tokens."""


def _others(logps: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    """[n, V] log-probs -> [n, V] those without the tokens [n], renormalised at the temperature; -inf at the tokens."""
    return (logps / temperature).scatter(1, tokens[:, None], -torch.inf).log_softmax(-1)


def _rest(temperature: float) -> Rowwise:
    """The cross-entropy of the items other than the token."""

    def cross_entropy(student: torch.Tensor, teacher: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        p = _others(teacher, tokens, temperature).exp()  # [n, V]
        q = _others(student, tokens, temperature).scatter(1, tokens[:, None], 0)  # not 0 * -inf
        return -(p * q).sum(-1)

    return Rowwise(name="rest", f=cross_entropy, eager=True)


@objective(reference=True, want=lambda config: (_rest(config.temperature),))
def nkd(config: NKDConfig, rows: Taught) -> Loss:
    one = rows.completion
    rest, logps = wide(one["rest"]), wide(one.logps)  # [N]
    target = -wide(one.reference_logps).exp() * logps  # [N]
    losses = target + config.gamma * config.temperature**2 * rest - config.ce_weight * logps  # [N]
    return Loss(losses, {"target": target.detach(), "rest": rest.detach()}, per="completion")
