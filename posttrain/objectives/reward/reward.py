"""Reward model (Bradley-Terry): the score of the preferred completion above that of the other, by a margin where one is known.

    loss = -log sigmoid(r_chosen - r_rejected - margin) + center * (r_chosen + r_rejected)^2

r is the one output of a sequence classification model at the last token of prompt and completion. It starts from a language
model, with a new output of 0, or from a reward model. A text is read as its template renders it or, without one, as it stands:
no end token is added, because who scores a text has none either. The margin is a column of the data, `margin`; rows have 0
where there is none. A pair says nothing of the sum of its scores; `center` keeps it near 0. Rewards logged: r;
`rewards/center` is the square that `center` multiplies.

Source: Ouyang et al. 2022, "Training language models to follow instructions with human feedback" (InstructGPT),
arXiv:2203.02155, equation 1, of pairs; margin: Touvron et al. 2023 (Llama 2), arXiv:2307.09288, equation 2; centring:
Eisenstein et al. 2023, "Helping or Herding?", arXiv:2312.09244, which is TRL's
`center_rewards_coefficient`.
Value at policy == reference: log 2 where the output is new and there are no margins; otherwise it depends on the data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...registry import objective
from ...schema import NonNegative
from ...scores import Scored
from ...stats import Loss, reward_metrics, wide


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Settings of a reward model."""

    center: NonNegative = 0.0
    """Pull of the two scores' sum to 0, which makes scores of different prompts comparable; 0.01 is usual."""


@objective(reference=False)
def reward(config: RewardConfig, pairs: Scored) -> Loss:
    chosen, rejected = wide(pairs.chosen.values), wide(pairs.rejected.values)  # [B]
    margins = chosen - rejected - pairs.margin.to(chosen.dtype)  # [B]
    squares = (chosen + rejected).square()  # [B]
    losses = torch.nn.functional.softplus(-margins) + config.center * squares  # [B]
    return Loss(losses, {**reward_metrics(chosen, rejected), "rewards/center": squares.detach()})
