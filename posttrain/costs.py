"""What two output heads say of several tokens at once: `Costs` and `Spans` as calls of the vocabulary kernel."""

from __future__ import annotations

import dataclasses

import posttrain_kernels as kernels
import torch
from posttrain_kernels import Head
from torch import Tensor

from .stats import Costs


def costs(head: Head, ref: Head, tokens: Tensor, want: Costs) -> dict[str, Tensor]:
    """`cost` and `cost_column` of N tokens; see `Costs`."""
    chosen = some(tokens, want.rows)
    return scattered(kernels.l1_cost(some_rows(head, chosen), some_rows(ref, chosen)), chosen, len(tokens))


def spans(head: Head, ref: Head) -> dict[str, Tensor]:
    """`span_cost` of N tokens; see `Spans`."""
    first = torch.arange(max(len(head.x) - 1, 0), device=head.x.device)
    return {"span_cost": torch.nn.functional.pad(kernels.span_cost(head, ref, first, first + 1), (len(head.x) - len(first), 0))}


def some(tokens: Tensor, most: int) -> Tensor:
    """[M] ascending positions of at most `most` of N tokens.

    A random subset, drawn from a seed that the tokens themselves are: the same in a resumed run and in any process.
    """
    if len(tokens) <= most:
        return torch.arange(len(tokens), device=tokens.device)
    generator = torch.Generator().manual_seed(int(tokens.sum()))
    return torch.randperm(len(tokens), generator=generator)[:most].sort().values.to(tokens.device)


def scattered(cost: Tensor, chosen: Tensor, n: int) -> dict[str, Tensor]:
    """[M, M] distances between M chosen ones of n tokens, as `Costs` promises them."""
    column = chosen.new_full((n,), -1).index_copy(0, chosen, torch.arange(len(chosen), device=chosen.device))
    return {"cost": cost.new_zeros(n, len(chosen)).index_copy(0, chosen, cost), "cost_column": column}


def some_rows(head: Head, chosen: Tensor) -> Head:
    """The head on some of its tokens."""
    extra = tuple((x[chosen], weight) for x, weight in head.extra)
    temperature = (
        head.temperature[chosen] if isinstance(head.temperature, Tensor) and head.temperature.dim() else head.temperature
    )
    return dataclasses.replace(head, x=head.x[chosen], extra=extra, temperature=temperature)
