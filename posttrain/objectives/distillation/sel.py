"""SEL: the squared difference of the two models' log-probs, over all items or at the token of the data.

    loss = 1/2 sum_v (log q_v - log p_v)^2      over: vocabulary
    loss = 1/2 (log q_y - log p_y)^2            over: token,   p teacher, q student, y the token

The second form needs one number of the teacher per token and, unlike a cross-entropy weighted by p_y, is not biased where y
is sampled from the teacher. The first is a sum of as many squares as there are items, most of them of hopelessly unlikely
ones: it starts hundreds of times larger than a KL, so the learning rate has to follow. The mean is over tokens.

Source: Zhao and Zhu 2023, "Towards the Fundamental Limits of Knowledge Transfer over Finite Domains", arXiv:2310.07838, eq.
4.5 and 4.6. There is no code of the authors.
Value at policy == reference: 0; with a cross-entropy term it depends on the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...registry import objective
from ...schema import NonNegative
from ...stats import Loss, Sum, Taught, wide


@dataclass(frozen=True, kw_only=True)
class SELConfig:
    """Settings of SEL."""

    over: Literal["vocabulary", "token"] = "vocabulary"
    """What the squares are summed over: all items, or the token of the data alone."""

    ce_weight: NonNegative = 0.0
    """Weight of the cross-entropy of the data's tokens."""


_SQUARES = Sum(
    name="squares",
    summand=lambda student, teacher: 0.5 * (student - teacher).square(),
    slope=lambda student, teacher: student - teacher,
    eager=True,
)


def _want(config: SELConfig) -> tuple[Sum, ...]:
    return (_SQUARES,) if config.over == "vocabulary" else ()


@objective(reference=True, want=_want, start=lambda config: 0.0 if config.ce_weight == 0 else None)
def sel(config: SELConfig, rows: Taught) -> Loss:
    one = rows.completion
    squares = wide(one["squares"]) if config.over == "vocabulary" else 0.5 * one.logratios.square()  # [N]
    return Loss(squares - config.ce_weight * wide(one.logps), {"squares": squares.detach()}, per="completion")
