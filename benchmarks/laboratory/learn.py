"""Training in the enumerated world: the expected loss of an objective over everything that can happen, and its fixed point."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from posttrain.experience import Experience
from posttrain.registry import Objective
from posttrain.stats import Loss, early_roles_of

from .world import World


def expected_loss(world: World, objective: Objective, config: Any, table: Tensor) -> Tensor:
    """The mean loss of a step that holds every row in proportion to its probability.

    The rows of an online objective are drawn from the policy as it is: groups of two, with the lesson of all of them at once.

    Args:
        table: [P * K, V] logits of the policy.
    """
    if objective.lesson is not None:
        return _expected_round(world, objective, config, table)
    statistics, weight = world.population(objective.family, objective.want(config), table)
    context = _context(world, objective, config, table, statistics, weight)
    loss = objective(config, dataclasses.replace(statistics, context=context))
    return sum(_mean(term, statistics, weight) for term in _terms(loss))


def _expected_round(world: World, objective: Objective, config: Any, table: Tensor) -> Tensor:
    rows, whole = world.groups, world.responses(table, objective.want(config))
    one = rows.of(whole)
    seen = Experience(
        scores=world.reward.reshape(-1)[rows.number],
        lengths=one.lengths,
        group=2,
        finished=torch.ones(len(one.lengths), dtype=torch.bool),
        old_logps=one.logps.detach(),
        reference_logps=one.reference_logps,
        more={name: values.detach() for name, values in one.more.items()},
    )
    lesson = objective.lesson(config, seen)
    statistics = objective.family(completion=one, **lesson.tokens)
    weight = world.drawn(whole.logp.detach().view(world.prompts, -1)) * lesson.keep
    return sum(_mean(term, statistics, weight) for term in _terms(objective(config, statistics)))


def _context(
    world: World, objective: Objective, config: Any, table: Tensor, statistics: Any, weight: Tensor
) -> dict[str, Tensor]:
    """The means before the step, and the running means where they no longer change: those of the policy at hand."""
    context = {"progress": torch.tensor(1.0, dtype=torch.float64)}
    with torch.no_grad():
        if objective.before is not None:
            early, early_weight = statistics, weight
            if early_roles_of(objective.family):
                early, early_weight = world.early(objective.family, table)
            values = objective.before(config, early)
            context |= {name: _weighted(value, early_weight) for name, value in values.items()}
        remembered = objective(config, dataclasses.replace(statistics, context=context)).remember
    for name, value in remembered.items():
        context[name] = _weighted(value, weight.repeat(len(value) // len(weight)))
    return context


def _terms(loss: Loss) -> list[Loss]:
    return [loss] if loss.plus is None else [loss, *_terms(loss.plus)]


def _mean(term: Loss, statistics: Any, weight: Tensor) -> Tensor:
    return _weighted(term.values, weight if term.per == "row" else getattr(statistics, term.per).spread(weight))


def _weighted(values: Tensor, weight: Tensor) -> Tensor:
    return (values * weight).sum() / weight.sum()


@dataclasses.dataclass(frozen=True)
class Learned:
    """Where training came to rest."""

    table: Tensor
    """[P * K, V] logits."""

    logp: Tensor
    """[P, n] log policy(y | x)."""

    slope: float
    """The largest entry of the gradient that is left."""


def learn(world: World, objective: Objective, config: Any, *, detached: bool = False, steps: int = 400) -> Learned:
    """Train from the author, the reference unless said otherwise, until the gradient of the expected loss is gone, with L-BFGS.

    Logits move in units of how seldom the reference comes to them, so that rare responses learn as fast as common ones.

    Args:
        detached: a part of the loss that changes with the policy has no gradient, so that the gradient is not that of the loss,
            and no line search can use the loss: steps of full length, without one.
        steps: at most.
    """
    scale = world.reach.rsqrt()
    moved = torch.zeros_like(scale, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [moved],
        max_iter=steps,
        max_eval=3 * steps,
        history_size=200,
        tolerance_grad=1e-6,
        tolerance_change=0,
        line_search_fn=None if detached else "strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = expected_loss(world, objective, config, world.start + scale * moved)
        loss.backward()
        return loss

    optimizer.step(closure)
    closure()
    table = (world.start + scale * moved).detach()
    return Learned(table, world.logp(table), moved.grad.abs().max().item())
