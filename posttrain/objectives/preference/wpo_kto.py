"""WPO on KTO: labelled completions, each weighted by how likely the policy is to write it itself.

    loss = sum over desirable rows of u * lambda_D * sigmoid(beta * (z0 - h))
         + sum over the others of u * lambda_U * sigmoid(beta * (h - z0))
    u = w(y) / sum of w over the step's rows of the same kind
    w(y) = exp(mean over t of log policy(y_t) - A_t), without gradient

h, z0 and lambda are those of `kto`, A_t that of `wpo`. So the weights of either kind sum to 1 over an optimizer step,
micro-batches and processes alike, and both kinds count the same however many rows they have: lambda_D / lambda_U alone is their
ratio, for which KTO advises 1 to 3/2. With equal weights and as many rows of either kind the loss is twice that of `kto`, which
is a mean over rows. The sums are taken before the step, in the pass for z0, which then reads the rows' own completions, too.

Source: Zhou et al. 2024, "WPO: Enhancing RLHF with Weighted Preference Optimization", arXiv:2406.11827, section 4.2.
Value at policy == reference: (lambda_D + lambda_U) / 2 where a step has rows of both kinds, else half the lambda it has.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from ...registry import find, objective
from ...schema import NonNegative, Positive
from ...stats import Labelled, Loss
from .kto import KTOConfig, kto
from .wpo import Alignment, log_weight, wanted, weight_metrics


@dataclass(frozen=True, kw_only=True)
class WPOKTOConfig:
    """Settings of WPO on KTO."""

    beta: Positive = 0.01
    """Pull to the reference; larger keeps the policy nearer. Also how soon a reward saturates."""

    desirable_weight: NonNegative = 1.0
    """lambda_D, the weight of all desirable rows of a step together."""

    undesirable_weight: NonNegative = 1.0
    """lambda_U, the weight of all undesirable rows of a step together."""

    alignment: Alignment = "sampled"
    """What the log-prob of each token is compared with: that of a token the policy samples, of its likeliest, or nothing."""


def _kto(config: WPOKTOConfig) -> KTOConfig:
    return KTOConfig(beta=config.beta, desirable_weight=config.desirable_weight, undesirable_weight=config.undesirable_weight)


def _before(config: WPOKTOConfig, rows: Labelled) -> dict[str, torch.Tensor]:
    w = log_weight(rows.completion, config.alignment).exp()  # [B]
    label = rows.label.to(w.dtype)
    return {**find("kto").before(_kto(config), rows), "w_desirable": w * label, "w_undesirable": w * (1 - label)}


@objective(reference=True, want=lambda config: wanted(config.alignment), before=_before, before_reads=("completion",))
def wpo_kto(config: WPOKTOConfig, rows: Labelled) -> Loss:
    w = log_weight(rows.completion, config.alignment).exp()  # [B]
    label = rows.label.to(w.dtype)  # [B]
    means = label * rows.context["w_desirable"] + (1 - label) * rows.context["w_undesirable"]  # of w of a kind, over all rows
    loss = kto(_kto(config), rows)
    u = w / means.to(w.dtype).clamp(min=torch.finfo(w.dtype).tiny)  # [B] times the number of rows, over which the mean is
    metrics = {
        **loss.metrics,
        **weight_metrics(w),
        **{f"wpo/{name}": rows.completion[name].detach() for name in wanted(config.alignment)},
    }
    return dataclasses.replace(loss, values=loss.values * u, metrics=metrics)
