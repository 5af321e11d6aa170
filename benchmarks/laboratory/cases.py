"""The methods, with the fixed point that theory gives them, or the reason why it gives none."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.registry import find
from posttrain.schema import parse

from .learn import Learned, learn
from .theory import (
    balanced,
    best_of_two,
    centred,
    constrained,
    exponential_mean,
    forward_step,
    generator,
    lower_mean,
    mean,
    per_token,
    scores,
    step_by_step,
    tilted,
    token_values,
    winners,
)
from .world import World

Measure = Callable[[Tensor, Tensor], Tensor]
Optimum = Callable[[World], Tensor]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A method with settings, trained to rest."""

    objective: str
    settings: Mapping[str, Any]

    flipped: float = 0.0
    """Share of wrong labels that the method is trained on."""

    detached: bool = False
    """Whether a part of the loss that changes with the policy has no gradient; see `learn`."""

    @property
    def name(self) -> str:
        words = [f"{key} {value}" for key, value in self.settings.items() if key != "loss"]
        return ", ".join([self.objective, *words]) + (f"; {self.flipped:.0%} of labels wrong" if self.flipped else "")

    def learn(self, world: World) -> Learned:
        """Train it; settings are read as those of a recipe are."""
        objective = find(self.objective)
        config = parse(objective.config, self.settings, self.objective)
        return learn(world.flipped(self.flipped), objective, config, detached=self.detached)


@dataclass(frozen=True, kw_only=True)
class Case(Trained):
    """A method whose fixed point is known."""

    fixed_point: str
    """The formula. q is the reference, h = log(policy / q), r the reward, p the probability to win against a response of q;
    c, lambda and nu are such that the policy sums to 1."""

    optimum: Optimum
    """In the world without wrong labels, [P, n] log-probs."""


@dataclass(frozen=True, kw_only=True)
class Unknown(Trained):
    """A method whose fixed point no formula gives."""

    reason: str


def _dpo(objective: str, flipped: float = 0.0, detached: bool = False, **settings: Any) -> Case:
    """A case whose fixed point is that of DPO at beta 1, without wrong labels."""
    return Case(
        objective=objective,
        settings=settings,
        fixed_point="q exp(r / beta)",
        optimum=lambda world: tilted(world.reference_logp, world.reward),
        flipped=flipped,
        detached=detached,
    )


def _fdpo(name: str) -> Case:
    return Case(
        objective="dpo",
        settings={"beta": 1.0, "divergence": name},
        fixed_point="q (f')^-1((r - lambda) / beta)",
        optimum=lambda world: constrained(world, generator(name), 1.0),
    )


def _hdpo(alpha: float) -> Case:
    return Case(
        objective="hdpo",
        settings={"beta": 1.0, "alpha": alpha},
        fixed_point="q^(1 / alpha) exp(r / (alpha beta))",
        optimum=lambda world: tilted(world.reference_logp / alpha, world.reward / alpha),
    )


def _wpo(alignment: str) -> Case:
    """The weight of a pair is the same in both orders, and in the mean over these the gradient of DPO is 0 at its optimum."""
    return _dpo("wpo", detached=True, loss={"name": "dpo", "beta": 1.0}, alignment=alignment)


def _wpo_side(side: str, sign: int) -> Case:
    """The weight of one side changes with the order of the pair: its logarithm adds to the reward, or goes off from it."""
    beta = 2.0

    def optimum(world: World) -> Tensor:
        score = world.reward + beta * world.reference_logp
        return per_token(world, torch.zeros_like(score), score, lambda n: n / (beta * n - sign))

    return Case(
        objective="wpo",
        settings={"loss": {"name": "dpo", "beta": beta}, "alignment": "none", "side": side},
        fixed_point=f"q exp((r {'+' if sign > 0 else '-'} log w + c) / beta), w = policy^(1 / length)",
        optimum=optimum,
        detached=True,
    )


def _by_token(objective: str, value: str, measure: Measure, **settings: Any) -> Case:
    """A divergence of every token in the margin, with its gradient."""
    return Case(
        objective=objective,
        settings={"beta": 1.0, "version": 1, **settings},
        fixed_point=f"q(v after s) exp(V(s v)), V(y) = r / beta, V(s) = {value}",
        optimum=lambda world: token_values(world, world.reward, measure),
    )


def _fitted(objective: str, pair: Callable[[Tensor], Tensor], **settings: Any) -> Case:
    """No scores suit all pairs at once; those that suit best take the place of the rewards."""
    return Case(
        objective=objective,
        settings={"beta": 1.0, **settings},
        fixed_point="q exp(s / beta), s the scores that fit all pairs best",
        optimum=lambda world: tilted(world.reference_logp, scores(world, pair)),
    )


def _smoothed(margin: Tensor) -> Tensor:
    """cDPO with eps 0.2."""
    softplus = torch.nn.functional.softplus
    return 0.8 * softplus(-margin) + 0.2 * softplus(margin)


def _exo(margin: Tensor) -> Tensor:
    """KL from the policy's choice between two responses to the label with eps 0.1."""
    chosen, rejected = (torch.nn.functional.logsigmoid(sign * margin) for sign in (1, -1))
    return chosen.exp() * (chosen - math.log(0.9)) + rejected.exp() * (rejected - math.log(0.1))


def _simpo(gamma: float) -> Case:
    def optimum(world: World) -> Tensor:
        fitted = scores(world, lambda margin: torch.nn.functional.softplus(gamma - margin)) if gamma else world.reward
        return per_token(world, torch.zeros_like(fitted), fitted / 2)

    return Case(
        objective="simpo",
        settings={"beta": 2.0, "gamma": gamma},
        fixed_point="exp(length (s + c) / beta), " + ("s the scores that fit all pairs best" if gamma else "s = r"),
        optimum=optimum,
    )


def _nca(beta: float, fixed_point: str) -> Case:
    return Case(
        objective="nca",
        settings={"beta": beta},
        fixed_point=fixed_point,
        optimum=lambda world: balanced(world, lambda h: beta * ((beta * h).sigmoid() / 2 - world.win * (-beta * h).sigmoid())),
    )


def _sppo(objective: str) -> Case:
    return Case(
        objective=objective,
        settings={"beta": 0.25},
        fixed_point="q exp((p - 1/2) / beta - nu e^h)",
        optimum=lambda world: balanced(world, lambda h: h - (world.win - 0.5) / 0.25),
    )


def _kto(objective: str) -> Case:
    return Case(
        objective=objective,
        settings={"beta": 1.0},
        fixed_point="0 where p < 1/2, else (2p - 1) beta sigmoid'(beta h) = nu e^h",
        optimum=lambda world: winners(world, 1.0),
    )


def _rlhf(**settings: Any) -> Case:
    """The KL in the reward: q exp(r / beta)."""
    return _dpo("rlhf", detached=True, beta=1.0, **settings)


def _fdpg(name: str) -> Case:
    """The way there differs, and not where it ends."""
    return _dpo("fdpg", detached=True, beta=1.0, divergence=name)


def _kl_in_the_loss(estimate: str, fixed_point: str, best: Measure) -> Case:
    """The policy answers for the KL of a token where it writes it, and not for that of later ones."""
    return Case(
        objective="rlhf",
        settings={"beta": 1.0, "kl": "loss", "kl_estimate": estimate},
        fixed_point=f"{fixed_point}, Q(y) = r / beta, Q(s) = E_policy Q(s v)",
        optimum=lambda world: step_by_step(world, best),
        detached=True,
    )


def tilted_step(values: Tensor, log_q: Tensor) -> Tensor:
    """[P, V], [P, V] -> [P, V] log of argmax_p E_p values - KL(p || q)."""
    return tilted(log_q, values)


def _superhf(beta: float) -> Case:
    return Case(
        objective="superhf",
        settings={"beta": beta},
        fixed_point="(best of two of the policy + beta q) / (1 + beta), after every s",
        optimum=lambda world: best_of_two(world, beta),
        detached=True,
    )


CASES = [
    *map(_fdpo, ["reverse_kl", "forward_kl", "js", "alpha:0.3", "alpha:0.5", "jeffreys", "squared_hellinger", "chi2_kl"]),
    *map(_hdpo, [0.8, 1.2]),
    Case(
        objective="ipo",
        settings={"beta": 0.25},
        fixed_point="q exp(p / beta)",
        optimum=lambda world: tilted(world.reference_logp, world.win / 0.25),
    ),
    Case(
        objective="ipo",
        settings={"beta": 0.25, "length_normalised": True},
        fixed_point="q exp(length (p / beta + c))",
        optimum=lambda world: per_token(world, world.reference_logp, world.win / 0.25),
    ),
    *map(_wpo, ["sampled", "greedy", "none"]),
    _wpo_side("chosen", 1),
    _wpo_side("rejected", -1),
    _by_token("tdpo", "E_q V(s v)", mean),
    _by_token("radpo", "mean of the lower half", lambda v, q: lower_mean(v, q, 0.5), risk="cvar_upper", mu=0.5),
    _by_token("radpo", "mean of the upper half", lambda v, q: -lower_mean(-v, q, 0.5), risk="cvar_lower", mu=0.5),
    _by_token("radpo", "-log E_q exp(-2 V) / 2", lambda v, q: -exponential_mean(-v, q, 2.0), risk="erm_upper", mu=2.0),
    _by_token("radpo", "log E_q exp(2 V) / 2", lambda v, q: exponential_mean(v, q, 2.0), risk="erm_lower", mu=2.0),
    _dpo("robust", flipped=0.1, beta=1.0, label_smoothing=0.1),
    _fitted("dpo", _smoothed, label_smoothing=0.2),
    _fitted("exo", _exo, label_smoothing=0.1),
    Case(
        objective="mmpo",
        settings={"beta": 1.0, "gamma": 1.5},
        fixed_point="q exp(gamma r / beta)",
        optimum=lambda world: tilted(world.reference_logp, 1.5 * world.reward),
    ),
    Case(
        objective="sigmoid_norm",
        settings={"beta": 2.0},
        fixed_point="q exp(length (r / beta + c))",
        optimum=lambda world: per_token(world, world.reference_logp, world.reward / 2),
    ),
    *map(_simpo, [0.0, 0.5]),
    Case(
        objective="cpo",
        settings={"beta": 1.0, "alpha": 0.0},
        fixed_point="exp(r / beta)",
        optimum=lambda world: world.reward.log_softmax(-1),
    ),
    _nca(1.0, "2 p q"),
    _nca(0.5, "beta (p sigmoid(-beta h) - sigmoid(beta h) / 2) = nu e^h"),
    *map(_sppo, ["sppo", "sppo_soft"]),
    Case(
        objective="bco",
        settings={"beta": 1.0},
        fixed_point="beta (p - sigmoid(beta h - delta)) / 2 = nu e^h, delta = E_q beta h",
        optimum=lambda world: centred(world, 1.0),
        detached=True,
    ),
    *map(_kto, ["kto", "apo_zero_unpaired", "apo_zero"]),
    _rlhf(),
    _rlhf(kl_estimate="analytic"),
    *(_rlhf(advantage=name) for name in ("dr_grpo", "opo")),
    _rlhf(mean="sequences"),
    *(_kl_in_the_loss(name, "q(v after s) exp(Q(s v))", tilted_step) for name in ("analytic", "k2", "ratio_k3")),
    Case(
        objective="rlhf",
        settings={"beta": 1.0, "kl": "loss", "advantage": "dr_grpo"},
        fixed_point="q(v after s) exp(Q(s v) / 2), Q as above: of two, the mean has half of the score itself",
        optimum=lambda world: step_by_step(world, lambda values, log_q: tilted_step(values / 2, log_q)),
        detached=True,
    ),
    _kl_in_the_loss("k3", "q(v after s) / (c - Q(s v))", forward_step),
    *map(_fdpg, ["reverse_kl", "forward_kl", "js", "squared_hellinger"]),
    *map(_superhf, [0.35, 1.0]),
]
"""In the order of the table."""


def _unknown(objective: str, reason: str, detached: bool = False, **settings: Any) -> Unknown:
    return Unknown(objective=objective, settings=settings, reason=reason, detached=detached)


UNKNOWN = [
    _unknown("tdpo", "no gradient through the KL of the chosen side", detached=True, beta=1.0, version=2),
    _unknown("dpo_shift", "the two sides have different factors", beta=1.0, lam=0.75),
    _unknown("ld_dpo", "what a token counts depends on the other response", beta=1.0),
    _unknown("discopop", "not convex: stays beside the reference", beta=1.0),
    _unknown("apo_down", "bounded: ends on one response, where gradients vanish", beta=1.0),
    _unknown("rpo", "pulled to the chosen responses besides", beta=1.0, nll="sum", eta=0.2),
    _unknown("cpo", "pulled to the chosen responses besides", beta=1.0),
    _unknown("orpo", "pulled to the chosen responses besides"),
    _unknown("rlhf", "of two scores only the order is left", detached=True, beta=1.0, kl="loss", advantage="grpo"),
]
"""In the order of the table. Not here: `hinge` and `slic`, which are not smooth, so that no gradient vanishes where they rest;
version 2 of `radpo`, as that of `tdpo`; `aot` and `aot_unpaired`, which are DPO on batches of one row and otherwise depend on
the batch; `wpo_kto`, whose weights move KTO's threshold with the policy; `sparsepo` and `mapo`, whose masks read hidden states,
which a table has not; of `rlhf` reinforce_pp, whose gradient has the direction of rloo's, and gae, whose critic does, too."""
