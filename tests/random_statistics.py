"""Random statistics of any family, made from its annotations: what the tests over all objectives run on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from posttrain.divergences import DIVERGENCES, FAMILIES
from posttrain.mismatch import early_roles
from posttrain.registry import Objective
from posttrain.stats import Completions, Loss, columns_of, early_roles_of
from posttrain.stats import roles_of as roles

MORE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"max_logp": lambda x: -x.abs(), "log_sum_p2": lambda x: -x.abs()}
"""Name in `want` -> its range; every other statistic (entropies, divergences) is positive."""

FRACTIONS = ("chosen_win", "rejected_win")
"""Columns of numbers between 0 and 1; every other column holds zeros and ones."""


def random_statistics(
    family: type,
    *,
    seed: int = 0,
    rows: int = 4,
    want: Sequence[str] = (),
    dtype: torch.dtype = torch.float64,
    early: bool = False,
) -> Any:
    """Statistics of `rows` rows: completions of 1 to 5 tokens, columns of numbers; `logps` are leaves with gradient.

    With `early` those before a step: completions of the early roles alone.
    """
    generator = torch.Generator().manual_seed(seed)

    def completions() -> Completions:
        lengths = torch.randint(1, 6, (rows,), generator=generator)
        draw = lambda: torch.randn(int(lengths.sum()), generator=generator, dtype=torch.float64)  # noqa: E731
        return Completions(
            logps=(-2 + 0.7 * draw()).to(dtype).requires_grad_(),
            lengths=lengths,
            reference_logps=(-2 + 0.7 * draw()).to(dtype),
            more={name: MORE.get(name, torch.abs)(draw()).to(dtype) for name in want},
        )

    def column(name: str) -> torch.Tensor:
        steps = 256 if name in FRACTIONS else 1
        return (torch.randint(0, steps + 1, (rows,), generator=generator) / steps).to(dtype)

    if early:
        nothing = dict.fromkeys([*roles(family), *columns_of(family)])
        return family(**nothing, **{name: completions() for name in early_roles_of(family)})
    columns = {name: column(name) for name in columns_of(family)}
    return family(**{name: completions() for name in roles(family)}, **columns)


def context_of(objective: Objective, statistics: Any, *, start: bool = False, **options: Any) -> Any:
    """The statistics with the means that the objective's `before` gives, of random completions where it reads early roles.

    Args:
        objective: with default settings.
        statistics: random ones of its family.
        start: policy and reference are equal before the step, too.
        options: of `random_statistics`.
    """
    if objective.before is None:
        return statistics
    early = random_statistics(objective.family, early=True, **options) if early_roles(objective) else statistics
    values = objective.before(objective.config(), at_reference(early) if start else early)
    return dataclasses.replace(statistics, context={name: value.detach().mean() for name, value in values.items()})


def each(statistics: Any, change: Callable[[Completions], Completions]) -> Any:
    """The same statistics with every role's completions changed."""
    there = {name: one for name, one in vars(statistics).items() if isinstance(one, Completions)}
    return dataclasses.replace(statistics, **{role: change(one) for role, one in there.items()})


def at_reference(statistics: Any) -> Any:
    """The statistics where the policy equals the reference: equal log-probs, divergences between them 0."""

    def equal(completions: Completions) -> Completions:
        more = {
            name: torch.zeros_like(values) if name.partition(":")[0] in {*DIVERGENCES, *FAMILIES} else values
            for name, values in completions.more.items()
        }
        return dataclasses.replace(completions.at_reference(), more=more)

    return each(statistics, equal)


def take(statistics: Any, order: Sequence[int]) -> Any:
    """The rows `order` of the statistics, every tensor a new leaf."""

    def rows_of(completions: Completions) -> Completions:
        ends = completions.lengths.cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        index = torch.tensor([t for row in order for t in range(starts[row], ends[row])])
        return Completions(
            logps=completions.logps.detach()[index].requires_grad_(),
            lengths=completions.lengths[list(order)],
            reference_logps=completions.reference_logps[index],
            more={name: values[index] for name, values in completions.more.items()},
        )

    family = type(statistics)
    return dataclasses.replace(
        statistics,
        **{name: rows_of(getattr(statistics, name)) for name in roles(family)},
        **{name: getattr(statistics, name)[list(order)] for name in columns_of(family)},
    )


def leaves(statistics: Any) -> list[torch.Tensor]:
    """The policy log-probs of every role."""
    return [getattr(statistics, role).logps for role in roles(type(statistics))]


def terms(loss: Loss) -> list[Loss]:
    """The loss and the terms added to it."""
    return [loss] if loss.plus is None else [loss, *terms(loss.plus)]


def by_row(loss: Loss, statistics: Any) -> list[torch.Tensor]:
    """Per row, the loss values of every term that belong to it."""
    parts = []
    for term in terms(loss):
        lengths = None if term.per == "row" else getattr(statistics, term.per).lengths.tolist()
        parts.append(term.values.split(1 if lengths is None else lengths))
    return [torch.cat(row) for row in zip(*parts, strict=True)]
