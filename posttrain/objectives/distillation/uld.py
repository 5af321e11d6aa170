"""ULD: the two distributions compared sorted, each item with the one of the same rank, which needs no common vocabulary.

    loss = CE + weight * 1/|y| sum_t sum_k |q_(k) - p_(k)|,   q_(1) >= q_(2) >= ..., p_(1) >= p_(2) >= ...

p teacher, q student. The sum is the Wasserstein distance of the two distributions under a cost that is the same for every
two items; it does not know which item has which rank, so beside a cross-entropy it is a weak teacher, and where both models
have one tokenizer `kd` tells the student more. Mean over the tokens of a completion, then over completions; that of CE is
over tokens.

Source: Boizard et al. 2024, "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs",
arXiv:2402.12030; the authors' code, llm-recipes, for the reduction and the weight. It compares answers position by position
up to the length of the shorter one.
Value at policy == reference: depends on the data; the distance is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...registry import objective
from ...schema import NonNegative
from ...stats import Loss, Rowwise, Taught, wide


@dataclass(frozen=True, kw_only=True)
class ULDConfig:
    """Settings of ULD."""

    weight: NonNegative = 1.5
    """Weight of the distance."""

    ce_weight: NonNegative = 1.0
    """Weight of the cross-entropy of the data's tokens."""


def _distance(student: torch.Tensor, teacher: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    q, p = (logps.sort(-1, descending=True).values.exp() for logps in (student, teacher))  # [n, V]
    return (q - p).abs().sum(-1)


@objective(
    reference=True,
    want=(Rowwise(name="sorted_l1", f=_distance),),
    start=lambda config: 0.0 if config.ce_weight == 0 else None,
)
def uld(config: ULDConfig, rows: Taught) -> Loss:
    one = rows.completion
    distance = wide(one["sorted_l1"])  # [N]
    cross_entropy = Loss(-config.ce_weight * wide(one.logps), per="completion")
    return Loss(config.weight * one.mean(distance), {"sorted_l1": distance.detach()}, plus=cross_entropy)
