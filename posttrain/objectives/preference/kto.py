"""Kahneman-Tversky Optimization: from single completions labelled desirable or not, measured against a common point.

    loss = lambda_D * sigmoid(beta * (z0 - h))  where the completion is desirable
    loss = lambda_U * sigmoid(beta * (h - z0))  where it is not,   h = sum_t log policy(y_t) - log reference(y_t)
    z0 = max(0, mean of h over mismatched completions),  without gradient

A mismatched completion is one of another prompt's, so z0 estimates the policy's divergence from the reference. The mean is over
all rows of an optimizer step, micro-batches and processes alike, and clamped after that; both are logged. HALOs and TRL take it
over the micro-batch (of all processes) and pair neighbouring rows in it, so that there it depends on how a batch is split; with
the same z0 losses and gradients are the same. HALOs leaves exact zeros out of the count. Rewards logged: beta * h.

Source: Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8; its advice on lambda_D n_D / (lambda_U n_U), n being the number of rows
of each kind, is eq. 9 of version 5: within [1, 3/2].
Value at policy == reference: lambda_D / 2 for desirable rows, lambda_U / 2 for the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ...registry import objective
from ...schema import NonNegative, Positive
from ...stats import Labelled, Loss, label_metrics


@dataclass(frozen=True, kw_only=True)
class KTOConfig:
    """Settings of KTO."""

    beta: Positive = 0.1
    """Pull to the reference; larger keeps the policy nearer. Also how soon a reward saturates."""

    desirable_weight: NonNegative = 1.0
    """lambda_D, the weight of desirable rows."""

    undesirable_weight: NonNegative = 1.0
    """lambda_U, the weight of undesirable rows."""


def _start(config: KTOConfig) -> float | None:
    return config.desirable_weight / 2 if config.desirable_weight == config.undesirable_weight else None


def _before(config: KTOConfig, rows: Labelled) -> dict[str, torch.Tensor]:
    return {"z0_raw": rows.mismatched.logratio}  # [B]


def _advise(config: KTOConfig, columns: Mapping[str, Sequence[float]]) -> list[str]:
    desirable = int(sum(columns["label"]))
    undesirable = len(columns["label"]) - desirable
    ours, theirs = config.desirable_weight * desirable, config.undesirable_weight * undesirable
    counts = f"{desirable} desirable rows of weight {config.desirable_weight:g}, {undesirable} undesirable ones of weight"
    counts += f" {config.undesirable_weight:g}"
    if not ours or not theirs:
        return [f"kto: {counts}: only one kind is learned from"]
    ratio = round(ours / theirs, 2)
    if 1 <= ratio <= 1.5:
        return []
    fix = f"desirable_weight {1.25 * theirs / desirable:.3g}"
    if ratio > 1.5:
        fix = f"undesirable_weight {ours / undesirable / 1.25:.3g}"
    return [f"kto: {counts}: a ratio of {ratio:g}, advised is 1 to 1.5; --{fix} makes it 1.25"]


@objective(reference=True, start=_start, before=_before, advise=_advise)
def kto(config: KTOConfig, rows: Labelled) -> Loss:
    h = rows.completion.logratio  # [B]
    raw = rows.context["z0_raw"]
    z0 = raw.clamp(min=0)
    label = rows.label.to(h.dtype)  # [B]
    weight = config.desirable_weight * label + config.undesirable_weight * (1 - label)  # [B]
    above = config.beta * (h - z0)  # [B]
    losses = weight * torch.sigmoid((1 - 2 * label) * above)  # [B]
    metrics = {
        **label_metrics(config.beta * h, label),
        "kl/z0": z0,
        "kl/z0_raw": raw,
        "saturated": (above.detach().abs() > 4).to(h.dtype),
    }
    return Loss(losses, metrics)
