"""SinKD: the student's distributions of many tokens carried to the teacher's at the least cost, whatever token they are of.

    loss = ce_weight CE + kd_weight KL(p || q) + weight <P, W>,   W_ij = sum_v |q_i(v) - p_j(v)|,   p teacher, q student
    P = Sinkhorn(exp(-W / eps)) / M: `iterations` times each row, then each column divided by its sum

i and j run over M completion tokens of the micro-batch, all of them or a random subset of `rows`; distributions at
`temperature`. P has mass 1: were it diagonal, <P, W> would be twice the mean total variation. CE and KL are at temperature
1. Iterations run on logarithms, where exp(-2 / eps) is not 0 for any eps. All means are over tokens.

Mass moves among all tokens, or among those of one completion (`among: completion`). The transport depends on which tokens
are together, so on how a step is split into micro-batches; the mean over micro-batches is weighted by their tokens. Its cost
is M^2 V operations and, unrolled, 2 `iterations` M^2 numbers: 10 MB for 256 rows, 2.7 GB for 4,096.

`plan_gradient`: `unrolled` differentiates through the iterations, as released; `implicit` through the plan they converge to,
in M^2 memory, and is as exact as they have converged; `detached` takes the plan as a constant, which is another gradient (39
% away in an example) at the same value.

Source: Cui et al. 2024, "Sinkhorn Distance Minimization for Knowledge Distillation", arXiv:2402.17110; constants as in the
authors' code: temperature 2, 20 iterations, eps 0.1. Their plan has mass M, so that the loss grows with the batch, times
0.001: `mass: rows`, `weight: 0.001`. Their code for language models (T0) hands logits [batch, time, items] to a loss made
for [batch, items]: its softmax runs over time, and columns are normalised over the batch instead of the teacher's tokens,
padding included, so that with one sequence a batch the plan is 1 everywhere and nothing is transported. That form is not
offered. Their KL lacks the teacher's entropy.
Value at policy == reference: depends on the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ...registry import objective
from ...schema import NonNegative, Positive, PositiveInt
from ...stats import Costs, Loss, Taught, Want, wide


@dataclass(frozen=True, kw_only=True)
class SinKDConfig:
    """Settings of SinKD."""

    weight: NonNegative = 0.8
    """Weight of the transport."""

    kd_weight: NonNegative = 0.9
    """Weight of the forward KL of each token."""

    ce_weight: NonNegative = 0.1
    """Weight of the cross-entropy of the data's tokens."""

    temperature: Positive = 2.0
    """Divides the logits of both models in the transport."""

    eps: Positive = 0.1
    """Weight of the plan's entropy: smaller makes it sharper, and needs more iterations."""

    iterations: PositiveInt = 20
    """Normalisations of rows and of columns."""

    rows: PositiveInt = 256
    """M, tokens of a micro-batch that take part at most; time and memory grow with its square."""

    among: Literal["batch", "completion"] = "batch"
    """Whose tokens mass may move among: all of the micro-batch, or those of one completion."""

    plan_gradient: Literal["unrolled", "implicit", "detached"] = "unrolled"
    """What of the plan is differentiated."""

    mass: Literal["one", "rows"] = "one"
    """Total mass of the plan: 1, or M as released."""


def sinkhorn(cost: torch.Tensor, eps: float, iterations: int, allowed: torch.Tensor | None = None) -> torch.Tensor:
    """[M, M] costs -> the plan between uniform marginals, of mass M; each of its columns sums to 1, its rows nearly.

    Args:
        allowed: [M, M] bool, blocks of tokens among which mass may move; None: all.
    """
    logs = -cost / eps
    if allowed is not None:
        logs = logs.masked_fill(~allowed, -torch.inf)
    for _ in range(iterations):
        logs = logs - logs.logsumexp(1, keepdim=True)
        logs = logs - logs.logsumexp(0, keepdim=True)
    return logs.exp()


def implicit_gradient(cost: torch.Tensor, plan: torch.Tensor, eps: float, allowed: torch.Tensor | None = None) -> torch.Tensor:
    """[M, M] the derivative of <P, W> in W where P is the converged plan: P (1 + (x_i + y_j - W_ij) / eps).

    P = exp((f_i + g_j - W_ij) / eps) has fixed sums, so a change of W changes f and g by the solution of a linear system; x and
    y solve its adjoint, with the sums of P W on the right. It is singular, as f + c and g - c give the same plan (in each
    block of `allowed`).
    """
    paid = plan * cost
    rows, columns = plan.sum(1), plan.sum(0)  # [M]
    reduced = torch.diag(columns) - plan.mT @ (plan / rows[:, None])
    right = paid.sum(0) - plan.mT @ (paid.sum(1) / rows)
    same = torch.outer(columns, columns)
    y = torch.linalg.solve(reduced + (same if allowed is None else same * allowed) / columns.sum(), right)
    x = (paid.sum(1) - plan @ y) / rows
    return plan * (1 + (x[:, None] + y - cost) / eps)


def _transported(config: SinKDConfig, cost: torch.Tensor, allowed: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """[M, M] costs -> [M] what each row pays, its gradient as the settings say, and [M, M] the plan without gradient."""
    if config.plan_gradient == "unrolled":
        plan = sinkhorn(cost, config.eps, config.iterations, allowed)
        return (plan * cost).sum(1), plan.detach()
    fixed = cost.detach()
    plan = sinkhorn(fixed, config.eps, config.iterations, allowed)
    slope = plan if config.plan_gradient == "detached" else implicit_gradient(fixed, plan, config.eps, allowed)
    return (plan * fixed + slope * (cost - fixed)).sum(1), plan


def _want(config: SinKDConfig) -> tuple[Want, ...]:
    return "forward_kl", Costs(rows=config.rows, temperature=config.temperature)


@objective(reference=True, want=_want, coupled=True)
def sinkd(config: SinKDConfig, rows: Taught) -> Loss:
    one, column = rows.completion, rows.completion["cost_column"]
    chosen = (column >= 0).nonzero().squeeze(1)  # [M]
    m, n = len(chosen), len(column)
    cost = wide(one["cost"])[chosen]  # [M, M]
    completion = one.spread(torch.arange(len(one.lengths), device=column.device))[chosen]  # [M]
    allowed = None if config.among == "batch" else completion[:, None] == completion
    paid, plan = _transported(config, cost, allowed)
    share = n / max(m, 1) * (m if config.mass == "rows" else 1)  # so that the mean over tokens is <P, W>
    transport = paid.new_zeros(n).index_copy(0, chosen, share * paid)  # [N]
    forward = wide(one["forward_kl"])  # [N]
    losses = config.weight * transport + config.kd_weight * forward - config.ce_weight * wide(one.logps)  # [N]
    own = column[chosen, None]  # [M, 1]
    metrics = {
        "transport": transport.detach(),
        "forward_kl": forward.detach(),
        "cost/own": cost.detach().gather(1, own),
        "plan/own": plan.gather(1, own),
        "plan/entropy": torch.special.entr(plan).sum(0),
        "plan/error": (plan.sum(1) - 1).abs(),
    }
    return Loss(losses, metrics, per="completion")
