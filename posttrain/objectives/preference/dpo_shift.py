"""DPO-Shift, which is Flex-DPO: DPO with a factor below 1 on the rejected reward, so that the chosen likelihood falls less.

    loss = -(1 - eps) * log sigmoid(m) - eps * log sigmoid(-m) - sft * log policy(y_chosen)
    m = r_chosen - lam * r_rejected,   r = beta * sum_t log policy(y_t) - log reference(y_t)

Flex-DPO has two betas: beta here is its beta+, beta * lam its beta-; with `sft` it is SFT-DPO. lam may move linearly to
`lam_end` over the training: 0.5 to 1 is the authors' increase_linear, 1 to 0.5 their decrease_linear. Rewards logged:
r_chosen and lam * r_rejected, as they stand in the loss; `rewards/unshifted_margins` is the margin of DPO, and `lam` the
factor of the step.

Source: Yang et al. 2025, "DPO-Shift: Shifting the Distribution of Direct Preference Optimization", arXiv:2502.07599, and the
authors' code; Flex-DPO: Yan et al. 2024, "3D-Properties", arXiv:2406.07327.
Value at policy == reference: log 2; with `sft` it depends on the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Gt, Le

from ...registry import objective
from ...schema import NonNegative, Positive, Probability
from ...stats import Loss, Pairs, reward_metrics

Factor = Annotated[float, Gt(0), Le(1)]


@dataclass(frozen=True, kw_only=True)
class DPOShiftConfig:
    """Settings of DPO-Shift."""

    beta: Positive = 0.01
    """Pull to the reference; larger keeps the policy nearer."""

    lam: Factor = 0.75
    """Factor on the rejected reward, the middle of the authors' sweep; 1 is DPO."""

    lam_end: Factor | None = None
    """The factor at the end of the training, reached linearly; null keeps it."""

    label_smoothing: Probability = 0.0
    """Assumed share of pairs whose preference is flipped."""

    sft: NonNegative = 0.0
    """Weight of the NLL of the chosen completion, summed over its tokens."""


@objective(reference=True, start=lambda config: None if config.sft else math.log(2))
def dpo_shift(config: DPOShiftConfig, pairs: Pairs) -> Loss:
    softplus = torch.nn.functional.softplus
    chosen, rejected = config.beta * pairs.chosen.logratio, config.beta * pairs.rejected.logratio  # [B]
    lam = chosen.new_tensor(config.lam)
    if config.lam_end is not None:
        lam = lam + (config.lam_end - config.lam) * pairs.context["progress"].to(lam)
    margins, eps = chosen - lam * rejected, config.label_smoothing  # [B]
    losses = (1 - eps) * softplus(-margins) + eps * softplus(margins) - config.sft * pairs.chosen.logp  # [B]
    more = {"rewards/unshifted_margins": (chosen - rejected).detach(), "lam": lam}
    return Loss(losses, {**reward_metrics(chosen, lam * rejected), **more})
