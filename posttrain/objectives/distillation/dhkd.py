"""DHKD's binary KL: each item asked by itself whether student and teacher say the same of it.

    loss = T^2 1/V sum_v KL(Bernoulli(1/2) || Bernoulli(sigmoid(log q_v - log p_v))),   p teacher, q student at temperature T

The mean is over tokens, and over the V items, which keeps the size for any vocabulary.

Source: Yang et al. 2024, "Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head",
arXiv:2411.08937. There it is put on the logits of a second output head, which is dropped after training, since on one head,
the paper finds, it and a cross-entropy work against each other. Here there is one head, and it stands alone unless
`ce_weight` is given. The authors' code sums over the items (`over_items: sum`), and takes raw logits, which carry an offset
that no distribution shows, different for each token and model: where both models' logits are normalised the two are the
same.
Value at policy == reference: 0; with a cross-entropy term it depends on the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from ...registry import objective
from ...schema import NonNegative, Positive
from ...stats import Loss, Rowwise, Taught, wide


@dataclass(frozen=True, kw_only=True)
class DHKDConfig:
    """Settings of the binary KL of DHKD."""

    temperature: Positive = 2.0
    """T, which divides the logits of both models."""

    over_items: Literal["mean", "sum"] = "mean"
    """A mean over the vocabulary, or the sum as released, which grows with it."""

    weight: NonNegative = 1.0
    """Of the binary KL."""

    ce_weight: NonNegative = 0.0
    """Weight of the cross-entropy of the data's tokens."""


def binary_kl(difference: torch.Tensor) -> torch.Tensor:
    """KL(Bernoulli(1/2) || Bernoulli(sigmoid(difference))), elementwise: log cosh(difference / 2), which is even and 0 at 0."""
    half = difference.abs() / 2
    return half + torch.nn.functional.softplus(-2 * half) - math.log(2)


def _want(config: DHKDConfig) -> tuple[Rowwise]:
    def over_items(student: torch.Tensor, teacher: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        terms = binary_kl(student - teacher)  # [n, V]; the log-probs are at temperature T already
        return terms.mean(-1) if config.over_items == "mean" else terms.sum(-1)

    return (Rowwise(name="binary_kl", f=over_items, temperature=config.temperature, eager=True),)


@objective(reference=True, want=_want, start=lambda config: 0.0 if config.ce_weight == 0 else None)
def dhkd(config: DHKDConfig, rows: Taught) -> Loss:
    binary = config.temperature**2 * wide(rows.completion["binary_kl"])  # [N]
    losses = config.weight * binary - config.ce_weight * wide(rows.completion.logps)  # [N]
    return Loss(losses, {"binary_kl": binary.detach()}, per="completion")
