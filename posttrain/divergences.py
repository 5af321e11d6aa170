"""Divergences between the policy and the reference, each declared once.

An entry serves three uses. `summand` is the term of D(policy || reference) at one vocabulary item, from the two log-probs:
D = sum_v summand(log policy(v), log reference(v)), for distillation and KL-regularised objectives. `link` is f'(u) at
u = e^h, up to the constant that makes it 0 at h = 0: the score of f-DPO at the sequence log-ratio h. For an f-divergence
D_f = E_reference f(u), the two are tied: d summand / d log policy = policy * f'(u).

Names: reverse_kl = KL(policy || reference), forward_kl = KL(reference || policy). `alpha` takes its parameter after a colon,
0 < a < 1, in the convention of Wang et al. 2024 (a -> 0 is reverse_kl, a -> 1 is forward_kl).

Source: Wang et al. 2024, "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence
Constraints", arXiv:2309.16240, table 1 and theorem 1; chi2_kl: Huang et al. 2024, arXiv:2407.13399.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from pydantic import AfterValidator, WithJsonSchema

from .schema import suggest

_MAX_LOG_RATIO = 20.0
"""Beyond this log-ratio a score is continued linearly: e^20 is the last power that leaves differences exact in float32
arithmetic of ordinary log-ratios, and its slope e^-20 on the other side is still a normal number."""


@dataclass(frozen=True)
class Divergence:
    """One divergence: its term at a vocabulary item and, where Theorem 1 of the paper allows it, its link for f-DPO."""

    summand: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """(log policy, log reference), any equal shapes -> the term of the sum, elementwise."""

    link: Callable[[torch.Tensor], torch.Tensor] | None
    """h -> f'(e^h) - f'(1); None where f-DPO is not defined."""

    refused: str = ""
    """Why there is no link."""

    def score(self, h: torch.Tensor) -> torch.Tensor:
        """[B] log-ratios -> [B] f'(e^h) - f'(1), continued linearly beyond |h| = 20 with its slope there.

        So it stays finite with a gradient that is neither 0 nor infinite for any log-ratio; no clamp silences a gradient.
        `continued` says where that happened.
        """
        assert self.link is not None, self.refused
        h = h.to(torch.promote_types(h.dtype, torch.float32))
        inside = h.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
        with torch.enable_grad():
            edge = inside.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.link(edge).sum(), edge)
        return self.link(inside) + slope * (h - inside)

    @staticmethod
    def continued(h: torch.Tensor) -> torch.Tensor:
        """[B] log-ratios -> [B] 1 where `score` is its linear continuation, else 0."""
        return (h.detach().abs() > _MAX_LOG_RATIO).to(torch.float32)


def _expm1(x: torch.Tensor) -> torch.Tensor:
    # torch differentiates expm1 as expm1(x) + 1, which has lost every digit of e^x below x = -17 in float32
    return torch.where(x < -1, x.clamp(max=-1).exp() - 1, x.expm1())


def _js_summand(lp: torch.Tensor, lq: torch.Tensor) -> torch.Tensor:
    middle = torch.logaddexp(lp, lq) - math.log(2)
    return lp.exp() * (lp - middle) + lq.exp() * (lq - middle)


def _js_link(h: torch.Tensor) -> torch.Tensor:
    return math.log(2) - torch.nn.functional.softplus(-h)


def _alpha_summand(a: float, lp: torch.Tensor, lq: torch.Tensor) -> torch.Tensor:
    return (((1 - a) * lp + a * lq).exp() - (1 - a) * lp.exp() - a * lq.exp()) / (a * (a - 1))


def _alpha_link(a: float, h: torch.Tensor) -> torch.Tensor:
    return -_expm1(-a * h) / a


DIVERGENCES: dict[str, Divergence] = {
    "reverse_kl": Divergence(lambda lp, lq: lp.exp() * (lp - lq), lambda h: h),
    "forward_kl": Divergence(lambda lp, lq: lq.exp() * (lq - lp), lambda h: -_expm1(-h)),
    "js": Divergence(_js_summand, _js_link),
    "jeffreys": Divergence(lambda lp, lq: (lp.exp() - lq.exp()) * (lp - lq), lambda h: h - _expm1(-h)),
    "squared_hellinger": Divergence(lambda lp, lq: ((lp / 2).exp() - (lq / 2).exp()).square(), lambda h: -_expm1(-h / 2)),
    "chi2_kl": Divergence(
        lambda lp, lq: lq.exp() * torch.expm1(lp - lq).square() / 2 + lp.exp() * (lp - lq), lambda h: h + _expm1(h)
    ),
    "total_variation": Divergence(
        lambda lp, lq: 0.5 * (lp.exp() - lq.exp()).abs(), None, "f' is a step: not invertible, so no policy is its optimum"
    ),
    "chi2": Divergence(
        lambda lp, lq: lq.exp() * torch.expm1(lp - lq).square(), None, "0 is in the domain of f' (theorem 1); use chi2_kl"
    ),
}
"""Name -> divergence, those without a parameter."""

FAMILIES: dict[str, Callable[[float], Divergence]] = {
    "alpha": lambda a: Divergence(partial(_alpha_summand, a), partial(_alpha_link, a)),
}
"""Name -> divergence of a parameter in (0, 1), written `name:<parameter>`."""


def choices(*, link: bool = False) -> list[str]:
    """The names a user may write; with `link`, those on which f-DPO is defined."""
    plain = [name for name, entry in DIVERGENCES.items() if entry.link is not None or not link]
    return plain + [f"{name}:<{name[0]}> with 0 < {name[0]} < 1" for name in FAMILIES]


def divergence(name: str) -> Divergence:
    """The divergence called `name`.

    Raises:
        ValueError: no such name, or a parameter that is missing or outside (0, 1); lists the choices.
    """
    head, colon, parameter = name.partition(":")
    if head in DIVERGENCES and not colon:
        return DIVERGENCES[head]
    if head in FAMILIES:
        try:
            value = float(parameter)
        except ValueError:
            value = math.nan
        if not 0 < value < 1:
            raise ValueError(f"{head} takes its parameter after a colon, 0 < {head[0]} < 1, for example {head}:0.5")
        return FAMILIES[head](value)
    raise ValueError(f"unknown divergence{suggest(name, [*DIVERGENCES, *FAMILIES])} Possible: {', '.join(choices())}")


def _with_link(name: str) -> str:
    entry = divergence(name)
    if entry.link is None:
        raise ValueError(f"not defined for preference learning: {entry.refused}. Possible: {', '.join(choices(link=True))}")
    return name


def _any(name: str) -> str:
    divergence(name)
    return name


def _schema(*, link: bool) -> WithJsonSchema:
    named = [name for name, entry in DIVERGENCES.items() if entry.link is not None or not link]
    families = [{"type": "string", "pattern": f"^{name}:", "title": f"{name}:<{name[0]}>"} for name in FAMILIES]
    return WithJsonSchema({"anyOf": [{"enum": named}, *families]})


LinkName = Annotated[str, AfterValidator(_with_link), _schema(link=True)]
"""Type of a setting that names a divergence with a link (f-DPO)."""

DivergenceName = Annotated[str, AfterValidator(_any), _schema(link=False)]
"""Type of a setting that names any divergence."""
