"""ULD: the two distributions compared sorted, each item with the one of the same rank, which needs no common vocabulary.

    loss = CE + weight * 1/|y| sum_t sum_k |q_(k) - p_(k)|,   q_(1) >= q_(2) >= ..., p_(1) >= p_(2) >= ...

p teacher, q student. The sum is the Wasserstein distance of the two distributions under a cost that is the same for every
two items; it does not know which item has which rank, so beside a cross-entropy it is a weak teacher, and where both models
have one tokenizer `kd` tells the student more. Only the `k` largest probabilities of each are compared: the sum is short by
at most what is beyond them, which is logged. Mean over the tokens of a completion, then over completions; that of CE is over
tokens.

A teacher with another tokenizer reads the same text in its own tokens (foreign.py), and the two are compared position by
position up to the end of the shorter one; |y| counts those positions, and `paired` logs their share of the student's.

Source: Boizard et al. 2024, "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs",
arXiv:2402.12030; the authors' code, llm-recipes, for the reduction and the weight. It sorts the whole vocabularies, zeros
appended to the smaller one.
Value at policy == reference: depends on the data; the distance is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...registry import objective
from ...schema import NonNegative, PositiveInt
from ...stats import Loss, Ranked, Taught, wide


@dataclass(frozen=True, kw_only=True)
class ULDConfig:
    """Settings of ULD."""

    weight: NonNegative = 1.5
    """Weight of the distance."""

    k: PositiveInt = 1024
    """Ranks that are compared; the whole vocabulary where it has no more."""

    ce_weight: NonNegative = 1.0
    """Weight of the cross-entropy of the data's tokens."""


@objective(
    reference=True,
    want=lambda config: (Ranked(k=config.k),),
    start=lambda config: 0.0 if config.ce_weight == 0 else None,
    any_tokenizer=True,
)
def uld(config: ULDConfig, rows: Taught) -> Loss:
    one = rows.completion
    q, p = wide(one["ranked_logps"]).exp(), wide(one["ranked_reference_logps"]).exp()  # [N, k], [N, k']
    most = max(q.shape[1], p.shape[1])
    q, p = (torch.nn.functional.pad(side, (0, most - side.shape[1])) for side in (q, p))  # [N, most]
    distance = (q - p).abs().sum(-1)  # [N]
    paired = one.more.get("paired", torch.ones_like(distance))  # [N]
    mean = one.sum(paired * distance) / one.sum(paired).clamp(min=1)  # [B]
    metrics = {
        "sorted_l1": distance.detach()[paired > 0],
        "paired": paired,
        "beyond/student": 1 - q.detach().sum(-1),
        "beyond/teacher": 1 - p.sum(-1),
    }
    cross_entropy = Loss(-config.ce_weight * wide(one.logps), per="completion")
    return Loss(config.weight * mean, metrics, plus=cross_entropy)
