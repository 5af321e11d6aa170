"""AKL: forward and reverse KL mixed at each token by where student and teacher differ, at the teacher's head or in its tail.

    loss_t = w_head * KL(teacher || student) + w_tail * KL(student || teacher),   mean over all completion tokens
    w_head = g_head / (g_head + g_tail),   w_tail = 1 - w_head,   without gradient
    g_head = sum of |teacher_v - student_v| over the head,   g_tail = the same over all other items

The head is the teacher's likeliest items: the fewest that have probability mu together (`paper`), or those whose running sum
does not pass mu, so that the item that reaches it falls into the tail, and in any case the likeliest (`released`, the authors'
code). Equally likely items enter in the order of their ids. Where student and teacher are equal there are no gaps to weigh,
and w_head is 1/2; the authors' code gives nan there. The vocabulary is not sorted: the head is found among the teacher's
likeliest items, and only the tokens whose head is larger are looked at further.

Source: Wu et al. 2024, "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models",
arXiv:2404.02657, and the authors' code.
Value at policy == reference: 0; with ce_weight it depends on the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from ...registry import objective
from ...schema import NonNegative, OpenUnit
from ...stats import Loss, Rowwise, Taught

_LOOKED_AT = (64, 1024, 16384)
"""Likeliest items among which the head is looked for, first these, then those; at mu = 0.5 almost every head is among 64."""


@dataclass(frozen=True, kw_only=True)
class AKLConfig:
    """Settings of AKL."""

    mu: OpenUnit = 0.5
    """Probability that the teacher's head has."""

    head: Literal["paper", "released"] = "paper"
    """Whether the item that reaches mu is in the head (paper) or in the tail (released)."""

    ce_weight: NonNegative = 0.0
    """Weight of the cross-entropy on the completion's tokens, added to the divergence."""


def _want(config: AKLConfig) -> tuple[Rowwise, ...]:
    f = partial(_adaptive, config.mu, config.head == "released")
    return (Rowwise(name="akl", f=f, also=("w_head", "head_size"), eager=True),)


@objective(reference=True, want=_want, start=lambda config: None if config.ce_weight else 0.0)
def akl(config: AKLConfig, taught: Taught) -> Loss:
    one = taught.completion
    values = one["akl"].to(torch.promote_types(one["akl"].dtype, torch.float32))  # [N]
    metrics = {"divergence/akl": values.detach(), "w_head": one["w_head"], "head_size": one["head_size"]}
    metrics |= {"nll/student": -one.logps.detach()}
    if one.reference_logps is not None:
        metrics["nll/teacher"] = -one.reference_logps
    if config.ce_weight:
        values = values - config.ce_weight * one.logps
    return Loss(values, metrics, "completion")


def _adaptive(
    mu: float, released: bool, lp: torch.Tensor, lq: torch.Tensor, _tokens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(student [n, V], teacher [n, V]) -> [n] each: the mixture, the weight of the forward KL, the size of the head.

    The weights have no gradient, so that with the slope of the mixture written down no graph of rows is needed.
    """
    with torch.no_grad():
        student = lp.detach()
        q, p, ratio = student.exp(), lq.exp(), student - lq
        forward, reverse = -torch.linalg.vecdot(p, ratio), torch.linalg.vecdot(q, ratio)
        gap = (p - q).abs_()
        total = gap.sum(-1)
        inside, size = _head(p, gap, mu, released)
        w = torch.where(total > 0, inside / total, 0.5)  # 0 / 0 where the models are equal
        slope = ratio.add_(1).mul_(q).mul_(1 - w[:, None]).addcmul_(p, w[:, None], value=-1)
        value = w * forward + (1 - w) * reverse
    linear = torch.linalg.vecdot(slope, lp)
    return value + (linear - linear.detach()), w, size


def _head(p: torch.Tensor, gap: torch.Tensor, mu: float, released: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, V] teacher and gaps -> [n] each: the gaps in the head, the number of its items."""
    inside, size = torch.zeros_like(p[:, 0]), torch.zeros_like(p[:, 0])
    rows, items = torch.arange(len(p), device=p.device), p.shape[1]
    for k in (*(k for k in _LOOKED_AT if k < items), items):
        some, its = (p, gap) if len(rows) == len(p) else (p[rows], gap[rows])
        likeliest = some.topk(k).values
        mass = likeliest.cumsum(-1)
        before = (mass <= mu if released else mass < mu).sum(-1)  # items that are in the head because mu is not reached yet
        count = before.clamp(min=1) if released else (before + 1).clamp(max=k)
        known = (before < k) | (k == items)
        least = likeliest.gather(1, count[:, None] - 1)  # [n, 1] the probability of the head's last item
        inside[rows[known]] = _above(some, its, least, count)[known]
        size[rows[known]] = count[known].to(size.dtype)
        rows = rows[~known]
        if not len(rows):
            break
    return inside, size


def _above(p: torch.Tensor, gap: torch.Tensor, least: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """[n] the gaps of the `size` items that are at least as likely as `least`, of equally likely ones those of smallest id."""
    inside = p >= least
    over = inside.sum(-1) - size  # more than the head has, where several items are as likely as its last
    rows = (over > 0).nonzero().squeeze(1)
    if len(rows):
        tied = p[rows] == least[rows]
        kept = tied.sum(-1) - over[rows]
        inside[rows] &= ~tied | (tied.cumsum(-1) <= kept[:, None])
    return torch.where(inside, gap, 0).sum(-1)
