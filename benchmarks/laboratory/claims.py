"""What the literature says of methods, looked at where every number is exact."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.registry import find
from posttrain.schema import parse

from .learn import learn
from .theory import constrained, generator, tilted
from .world import Language, World


@dataclass(frozen=True)
class Claim:
    """A statement, whether it holds in this world, and the numbers that say so."""

    statement: str
    source: str
    verdict: str
    rows: list[dict[str, Any]]


def policy(world: World, objective: str, *, detached: bool = False, **settings: Any) -> Tensor:
    """[P, n] log-probs of what a method learns; `detached` as in `learn`."""
    found = find(objective)
    return learn(world, found, parse(found.config, settings, objective), detached=detached).logp


def divergence(first: Tensor, second: Tensor) -> float:
    """KL(first || second) of [P, n] log-probs, mean over prompts."""
    return (first.exp() * (first - second)).sum(-1).mean().item()


def entropy(logp: Tensor) -> float:
    """Of the response, in nats, mean over prompts."""
    return -(logp.exp() * logp).sum(-1).mean().item()


def reward(world: World, logp: Tensor) -> float:
    """Expected reward, mean over prompts."""
    return (logp.exp() * world.reward).sum(-1).mean().item()


def beta_of(wanted: float, world: World, optimum: Callable[[float], Tensor]) -> float:
    """The beta at which the optimum has this expected reward, by secants in its logarithm."""
    points = [(x, reward(world, optimum(math.exp(x))) - wanted) for x in (0.0, -0.2)]
    while abs(points[-1][1]) > 1e-9 and len(points) < 12:
        (one, low), (two, high) = points[-2:]
        x = two - high * (two - one) / (high - low)
        points.append((x, reward(world, optimum(math.exp(x))) - wanted))
    return math.exp(points[-1][0])


def forward_kl_is_diverse(world: World) -> Claim:
    """Entropies under reverse KL, alpha, and forward KL: at one beta, and at the beta that gives each the same reward."""
    wanted, rows = reward(world, tilted(world.reference_logp, world.reward)), []
    for name in ("reverse_kl", "alpha:0.5", "forward_kl"):
        same = policy(world, "dpo", beta=1.0, divergence=name)
        beta = beta_of(wanted, world, lambda beta, name=name: constrained(world, generator(name), beta))
        equal = policy(world, "dpo", beta=beta, divergence=name)
        rows.append({"divergence": name, **_spread(world, same), "beta'": beta, "entropy, beta'": entropy(equal)})
    one, equal = (_rising([row[key] for row in rows]) for key in ("entropy", "entropy, beta'"))
    gap = rows[2]["entropy, beta'"] - rows[0]["entropy, beta'"]
    verdict = f"at beta 1 {one}; at the beta' of equal reward {equal}, by {gap:.3f} nats"
    source = "Wang et al. 2024, arXiv:2309.16240"
    return Claim("Forward KL keeps the policy more diverse than reverse KL, alpha:0.5 lies between", source, verdict, rows)


def alpha_sets_the_entropy(world: World) -> Claim:
    """Entropies under H-DPO's alpha, beside DPO's at the beta that gives it the same reward."""
    rows = []
    for alpha in (0.8, 0.9, 1.0, 1.1, 1.25):
        learned = policy(world, "hdpo", beta=1.0, alpha=alpha)
        beta = beta_of(reward(world, learned), world, lambda beta: tilted(world.reference_logp, world.reward / beta))
        dpo = policy(world, "dpo", beta=beta)
        rows.append({"alpha": alpha, **_spread(world, learned), "beta' of DPO": beta, "entropy of DPO, beta'": entropy(dpo)})
    beyond = all((row["entropy"] - row["entropy of DPO, beta'"]) * (row["alpha"] - 1) >= 0 for row in rows)
    verdict = f"{_rising([row['entropy'] for row in rows])}, {'also' if beyond else 'but not'} against DPO at the same reward"
    source = "Omura et al. 2024, arXiv:2411.07595"
    return Claim("H-DPO with alpha < 1 has a lower entropy than DPO, with alpha > 1 a higher one", source, verdict, rows)


def kto_ignores_noise(world: World) -> Claim:
    """How far noise in the preferences moves what a method learns."""
    kinds = {
        "10% of labels wrong": world.flipped(0.1),
        "25% of labels wrong": world.flipped(0.25),
        "circles, p as before": world.with_preference(world.preference + cyclic(world)),
        "random": world.with_preference((world.preference.logit() + random(world)).sigmoid()),
    }
    methods = {"dpo": {"beta": 1.0}, "ipo": {"beta": 0.25}, "kto": {"beta": 1.0}}
    clean = {name: policy(world, name, **settings) for name, settings in methods.items()}
    rows = []
    for kind, noisy in kinds.items():
        sides = ((noisy.win > 0.5) != (world.win > 0.5)).double().mean().item()
        row = {"noise": kind, "intransitive triples": intransitive(noisy), "p changes sides": sides}
        row |= {f"KL, {name}": divergence(policy(noisy, name, **methods[name]), logp) for name, logp in clean.items()}
        rows.append(row)
    flips, circles, drawn = rows[1], rows[2], rows[3]
    moved = "more" if drawn["KL, kto"] > drawn["KL, dpo"] else "less"
    parts = [
        f"{'it holds' if flips['KL, kto'] < 1e-3 < flips['KL, dpo'] else 'it does not hold'} for wrong labels",
        f"circles that leave each p as it is are ignored by {', '.join(m for m in methods if abs(circles[f'KL, {m}']) < 1e-3)}",
        f"noise that changes p moves KTO {moved} than DPO",
    ]
    verdict = "; ".join(parts)
    return Claim("KTO ignores noisy and intransitive preferences", "Ethayarajh et al. 2024, arXiv:2402.01306", verdict, rows)


def kto_follows_the_majority() -> Claim:
    """Two responses, a majority for the one that the reference writes seldom."""
    majority, seldom, beta = 0.6, 0.2, 1.0
    reference = torch.tensor([[seldom, 1 - seldom]] * 2, dtype=torch.float64).log()
    preference = torch.tensor([[0.5, majority], [1 - majority, 0.5]], dtype=torch.float64).expand(2, 2, 2)
    world = World(Language(2, 1), reference, preference.logit()[:, :, 1], preference)
    rows = [{"method": "reference", "the majority's": seldom}]
    for name in ("dpo", "ipo", "kto"):
        rows.append({"method": name, "the majority's": policy(world, name, beta=beta)[0, 0].exp().item()})
    dpo, kto = rows[1]["the majority's"], rows[3]["the majority's"]
    verdict = "it holds" if dpo < 0.5 and kto > 0.99 else "it does not hold"
    statement = "Where 60% prefer what the reference writes seldom, DPO goes on preferring the other, KTO follows the majority"
    return Claim(statement, "Ethayarajh et al. 2024, arXiv:2402.01306", verdict, rows)


def where_the_kl_goes(world: World) -> Claim:
    """What RLHF with KL learns by where the KL goes, beside the maximum of E r - beta KL."""
    rows = []
    for beta in (1.0, 0.25):
        optimum = tilted(world.reference_logp, world.reward / beta)
        best = _regularised(world, optimum, beta)
        for where, estimate in (("reward", "k1"), ("loss", "analytic"), ("loss", "k3")):
            learned = policy(world, "rlhf", detached=True, beta=beta, kl=where, kl_estimate=estimate)
            row = {"beta": beta, "KL in the": f"{where}, {estimate}", "reward": reward(world, learned)}
            row |= {"KL(learned, reference)": divergence(learned, world.reference_logp)}
            row |= {"KL(learned, q exp(r / beta))": divergence(learned, optimum)}
            rows.append(row | {"short of the maximum": best - _regularised(world, learned, beta)})
    exact, biased = rows[::3], [row for i, row in enumerate(rows) if i % 3]
    holds = max(row["short of the maximum"] for row in exact) < 1e-6 < 1e-3 < min(row["short of the maximum"] for row in biased)
    source = "A comedy of estimators 2025, arXiv:2512.21852"
    statement = "KL in the reward maximises E r - beta KL, KL in the loss does not"
    return Claim(statement, source, "it holds" if holds else "it does not hold", rows)


def _regularised(world: World, logp: Tensor, beta: float) -> float:
    return reward(world, logp) - beta * divergence(logp, world.reference_logp)


def claims(world: World) -> list[Claim]:
    """All of them."""
    whole = [forward_kl_is_diverse(world), alpha_sets_the_entropy(world), kto_ignores_noise(world)]
    return [*whole, kto_follows_the_majority(), where_the_kl_goes(world)]


def _spread(world: World, logp: Tensor) -> dict[str, float]:
    return {"entropy": entropy(logp), "reward": reward(world, logp)}


def _rising(values: list[float]) -> str:
    return "it holds" if values == sorted(set(values)) else "it does not hold"


def cyclic(world: World, seed: int = 0) -> Tensor:
    """[P, n, n] antisymmetric changes of preferences that leave every response its probability to win against the reference."""
    q = world.reference_logp.exp()
    drawn = torch.randn(world.preference.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn = (drawn - drawn.mT).sign()
    gain = (drawn * q[:, None, :]).sum(-1)
    drawn = drawn - gain[:, :, None] + gain[:, None, :]
    room = torch.minimum(world.preference, 1 - world.preference) / drawn.abs().clamp(min=1e-12)
    return drawn * room.amin((-1, -2), keepdim=True)


def random(world: World, seed: int = 0) -> Tensor:
    """[P, n, n] antisymmetric changes of log-odds, of standard deviation 1."""
    drawn = torch.randn(world.preference.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (drawn - drawn.mT) / 2**0.5


def intransitive(world: World) -> float:
    """The share of triples of responses of which each is preferred to the next one, in a circle."""
    beats = (world.preference > 0.5).double()
    n = beats.shape[1]
    circles = torch.einsum("pij,pjk,pki->p", beats, beats, beats) / 3
    return (circles / (n * (n - 1) * (n - 2) / 6)).mean().item()
