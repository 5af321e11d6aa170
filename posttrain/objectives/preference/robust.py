"""Robust DPO (rDPO): DPO's loss made unbiased under a known share of flipped preferences.

    loss = ((1 - eps) * L(m) - eps * L(-m)) / (1 - 2 * eps) = L(m) - eps / (1 - 2 * eps) * m,   L(m) = -log sigmoid(m)
    m = r_chosen - r_rejected,   r = beta * sum_t log policy(y_t) - log reference(y_t)

The second form is the one computed: nothing in it cancels. The loss has no lower bound, since a margin that already is large
goes on being rewarded with slope eps / (1 - 2 * eps); cDPO (`dpo` with `label_smoothing`) is the bounded one. Rewards logged:
r as it stands in the loss.

Source: Chowdhury et al. 2024, "Provably Robust DPO: Aligning Language Models with Noisy Feedback", arXiv:2403.00409; TRL's
`robust`.
Value at policy == reference: log 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Lt

from ...registry import objective
from ...schema import Positive
from ...stats import Loss, Pairs, reward_metrics


@dataclass(frozen=True, kw_only=True)
class RobustConfig:
    """Settings of robust DPO."""

    beta: Positive = 0.1
    """Pull to the reference; larger keeps the policy nearer."""

    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.1
    """Share of pairs whose preference is flipped; 0 is plain DPO."""


@objective(reference=True, start=math.log(2))
def robust(config: RobustConfig, pairs: Pairs) -> Loss:
    chosen, rejected = config.beta * pairs.chosen.logratio, config.beta * pairs.rejected.logratio  # [B]
    margins, eps = chosen - rejected, config.label_smoothing
    losses = torch.nn.functional.softplus(-margins) - eps / (1 - 2 * eps) * margins  # [B]
    return Loss(losses, reward_metrics(chosen, rejected))
