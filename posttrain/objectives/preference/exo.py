"""EXO on preferences: the reverse KL from the policy's distribution over the two completions to the smoothed label.

    loss = s * log(s / (1 - eps)) + (1 - s) * log((1 - s) / eps),   s = sigmoid(r_chosen - r_rejected)
    r = beta * sum_t log policy(y_t) - log reference(y_t)

DPO is the forward KL to the same label. The minimum is at a margin of log((1 - eps) / eps); far from it on the wrong side the
gradient vanishes, as it does for any reverse KL. Rewards logged: r as it stands in the loss.

Source: Ji et al. 2024, "Towards Efficient Exact Optimization of Language Model Alignment", arXiv:2402.00856, EXO-pref. The
authors' code puts 0 and -10 in place of log(1 - eps) and log(eps), which is not a distribution (`released`; eps is then
unused).
Value at policy == reference: -log 2 - (log(1 - eps) + log(eps)) / 2; with `released` 5 - log 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...registry import objective
from ...schema import OpenUnit, Positive
from ...stats import Loss, Pairs, reward_metrics


@dataclass(frozen=True, kw_only=True)
class EXOConfig:
    """Settings of EXO."""

    beta: Positive = 0.5
    """Pull to the reference; larger keeps the policy nearer."""

    label_smoothing: OpenUnit = 1e-3
    """The eps of the label: probability of the rejected completion."""

    released: bool = False
    """Log-probs 0 and -10 for the label, as the authors' code has them."""


def _label(config: EXOConfig) -> tuple[float, float]:
    """Log-probs of chosen and rejected under the label."""
    return (0.0, -10.0) if config.released else (math.log1p(-config.label_smoothing), math.log(config.label_smoothing))


@objective(reference=True, start=lambda config: -math.log(2) - sum(_label(config)) / 2)
def exo(config: EXOConfig, pairs: Pairs) -> Loss:
    functional = torch.nn.functional
    chosen, rejected = config.beta * pairs.chosen.logratio, config.beta * pairs.rejected.logratio  # [B]
    log_chosen, log_rejected = functional.logsigmoid(chosen - rejected), functional.logsigmoid(rejected - chosen)
    label_chosen, label_rejected = _label(config)
    losses = log_chosen.exp() * (log_chosen - label_chosen) + log_rejected.exp() * (log_rejected - label_rejected)  # [B]
    return Loss(losses, reward_metrics(chosen, rejected))
