"""Pairs written by hand, and pairs at the ends of the range: what the tests of single objectives run on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from posttrain.registry import Objective
from posttrain.stats import Completions, Loss, Pairs

EXTREMES = (-1000.0, -512.0, -30.0, 0.0, 30.0, 512.0, 1000.0)
"""Log-ratios of sequences, from a policy that has collapsed away from a completion to one that has collapsed onto it."""


def completions(
    policy: Sequence[Sequence[float]],
    reference: Sequence[Sequence[float]] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Completions:
    """Completions with these log-probs of their tokens; the reference's are 0 where none are given."""

    def flat(rows: Sequence[Sequence[float]]) -> torch.Tensor:
        return torch.tensor([value for row in rows for value in row], dtype=dtype)

    return Completions(
        logps=flat(policy).requires_grad_(),
        lengths=torch.tensor([len(row) for row in policy]),
        reference_logps=flat([[0.0] * len(row) for row in policy] if reference is None else reference),
    )


def pairs(chosen: Sequence[float], rejected: Sequence[float], dtype: torch.dtype = torch.float64) -> Pairs:
    """Completions of one token, with these log-ratios (and log-probs: the reference stands at 0)."""
    return Pairs(
        chosen=completions([[value] for value in chosen], dtype=dtype),
        rejected=completions([[value] for value in rejected], dtype=dtype),
    )


def slopes(loss: Loss, batch: Pairs) -> list[torch.Tensor]:
    """Gradients of the sum of the values with respect to the log-probs of chosen and of rejected tokens."""
    return list(torch.autograd.grad(loss.values.sum(), [batch.chosen.logps, batch.rejected.logps], retain_graph=True))


def at_the_ends(
    objective: Objective, config: Any, values: Sequence[float] = EXTREMES, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Every pair of `values` as a pair of log-ratios: assert finite losses, metrics and gradients.

    Returns:
        Chosen and rejected log-ratios [B] and the gradients with respect to them.
    """
    chosen, rejected = [one for one in values for _ in values], list(values) * len(values)
    batch = pairs(chosen, rejected, dtype)
    loss = objective(config, batch)
    assert loss.values.isfinite().all()
    assert all(metric.isfinite().all() for metric in loss.metrics.values())
    gradients = slopes(loss, batch)
    assert all(gradient.isfinite().all() for gradient in gradients)
    return torch.tensor(chosen), torch.tensor(rejected), gradients
