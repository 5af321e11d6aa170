"""A game of preferences that go round in circles: INPO's iterates beside the steps that they are, and the policy nobody beats.

Two players draw a response each, from policies that pay tau for their KL to the reference; the payoff of the first is

    J(a, b) = E P(y_a > y_b) - tau KL(a || reference) + tau KL(b || reference)

Source: Zhang et al. 2024, "Iterative Nash Policy Optimization", arXiv:2407.00617.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from posttrain.registry import find
from posttrain.schema import parse

from .claims import divergence
from .learn import Learned, learn
from .theory import tilted
from .world import World, world

ETA, RATIO = 1.0, 1 / 3
"""tau is their product."""


def game(strength: float = 3.0, seed: int = 0) -> World:
    """A world whose preferences no reward explains: those between two responses are drawn for themselves."""
    there = world(size=4, length=2, prompts=2, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    n = len(there.language.responses)
    drawn = strength * torch.randn((there.prompts, n, n), generator=generator, dtype=torch.float64)
    return there.with_preference((drawn.triu(1) - drawn.triu(1).mT).sigmoid())


def wins(there: World, logp: Tensor) -> Tensor:
    """[P, n] how often each response is preferred to one of a policy."""
    return (there.preference @ logp.exp()[:, :, None])[:, :, 0]


def step(there: World, previous: Tensor, eta: float = ETA, ratio: float = RATIO) -> Tensor:
    """[P, n] log of the step of mirror descent: reference^ratio * previous^(1 - ratio) * exp(P(y > previous) / eta)."""
    return tilted(ratio * there.reference_logp + (1 - ratio) * previous, wins(there, previous) / eta)


def gain(there: World, logp: Tensor, tau: float = ETA * RATIO) -> Tensor:
    """[P] what the best answer to a policy gains over the draw, max J(a, policy) - 1/2; 0 for the Nash policy alone."""
    best = tau * (there.reference_logp + wins(there, logp) / tau).logsumexp(-1)
    return best + tau * (logp.exp() * (logp - there.reference_logp)).sum(-1) - 0.5


def nash(there: World, tau: float = ETA * RATIO) -> Tensor:
    """[P, n] log of the Nash policy, reference * exp(P(y > itself) / tau): small steps towards it, then Newton's."""
    logp = there.reference_logp
    for _ in range(300):
        logp = (0.9 * logp + 0.1 * tilted(there.reference_logp, wins(there, logp) / tau)).log_softmax(-1)

    def off(flat: Tensor) -> Tensor:
        guess = flat.view_as(logp)
        return (guess - tilted(there.reference_logp, wins(there, guess) / tau)).reshape(-1)

    for _ in range(5):
        flat = logp.reshape(-1)
        slope = torch.autograd.functional.jacobian(off, flat)
        logp = (flat - torch.linalg.solve(slope, off(flat))).view_as(logp)
    return logp


def iterates(there: World, count: int, **settings: Any) -> Iterator[tuple[World, Learned]]:
    """INPO trained to rest again and again, on all pairs of the last iterate: the world before, and what was learned in it."""
    inpo = find("inpo")
    config = parse(inpo.config, {"eta": ETA, "ratio": RATIO, **settings}, "inpo")
    for _ in range(count):
        learned = learn(there, inpo, config)
        yield there, learned
        there = dataclasses.replace(there, author=learned.table)


def rows(count: int = 8) -> list[dict[str, Any]]:
    """The table: each iterate beside the step of mirror descent from the one before, and beside the Nash policy."""
    there = game()
    goal = nash(there)
    start = there.reference_logp
    found = [{"iterate": "the reference", "KL(iterate, step)": 0.0, **_beside(there, start, goal)}]
    for number, (before, learned) in enumerate(iterates(there, count), 1):
        off = divergence(learned.logp, step(there, before.author_logp))
        found.append({"iterate": str(number), "KL(iterate, step)": off, **_beside(there, learned.logp, goal)})
    return found


def _beside(there: World, logp: Tensor, goal: Tensor) -> dict[str, float]:
    return {"KL(iterate, Nash)": divergence(logp, goal), "gain of the best answer": gain(there, logp).mean().item()}
