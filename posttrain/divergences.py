"""Divergences between the policy and the reference, each declared once.

An entry serves three uses. `summand` is the term of D(policy || reference) at one vocabulary item, from the two log-probs:
D = sum_v summand(log policy(v), log reference(v)), for distillation and KL-regularised objectives. `link` is f'(u) at
u = e^h, up to the constant that makes it 0 at h = 0: the score of f-DPO at the sequence log-ratio h. For an f-divergence
D_f = E_reference f(u), the two are tied: d summand / d log policy = policy * f'(u).

Names: reverse_kl = KL(policy || reference), forward_kl = KL(reference || policy). A parameter stands after a colon, strictly
between 0 and 1:

    alpha:<a>                        in the convention of Wang et al. 2024 (a -> 0 is reverse_kl, a -> 1 is forward_kl)
    jsd:<b>                          b KL(reference || m) + (1 - b) KL(policy || m),  m = b reference + (1 - b) policy
    skew_kl:<a>                      KL(reference || a reference + (1 - a) policy)
    skew_reverse_kl:<a>              KL(policy || (1 - a) reference + a policy)
    skew_reverse_kl_detached:<a>     the same value, without gradient through the mixture

jsd is that of GKD. At its ends it vanishes: jsd:<b> / b goes to forward_kl as b -> 0, jsd:<b> / (1 - b) to reverse_kl as
b -> 1, so GKD's code puts the two KLs there, with a jump of scale; here they are written by their names. `js` is 2 jsd:0.5.
DistiLLM writes 1 - b for b.

Source: Wang et al. 2024, "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence
Constraints", arXiv:2309.16240, table 1 and theorem 1; chi2_kl: Huang et al. 2024, arXiv:2407.13399; jsd: Agarwal et al. 2024,
"On-Policy Distillation of Language Models", arXiv:2306.13649; skew: Ko et al. 2024, "DistiLLM", arXiv:2402.03898, and, for the
detached mixture, the code of Ko et al. 2025, "DistiLLM-2", arXiv:2503.07067.
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

    slope: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    """The derivative of `summand` in log policy, where that is less work than to let autograd find it."""

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

    def derivative(self, h: torch.Tensor) -> torch.Tensor:
        """[B] log-ratios -> [B] f'(e^h) - f'(1), of any f-divergence and without gradient: `score`, or where there is no link
        the slope of `summand`, which is policy * f', within |h| = 20."""
        if self.link is not None:
            return self.score(h.detach()).detach()
        h = h.detach().to(torch.promote_types(h.dtype, torch.float32)).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
        both = torch.stack([h, torch.zeros_like(h)])
        with torch.enable_grad():
            lp = both.clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.summand(lp, torch.zeros_like(lp)).sum(), lp)
        at_h, at_0 = slope * (-both).exp()
        return at_h - at_0

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


def _js_slope(lp: torch.Tensor, lq: torch.Tensor) -> torch.Tensor:
    return lp.exp() * (lp - torch.logaddexp(lp, lq) + math.log(2))


def _js_link(h: torch.Tensor) -> torch.Tensor:
    return math.log(2) - torch.nn.functional.softplus(-h)


def _alpha_summand(a: float, lp: torch.Tensor, lq: torch.Tensor) -> torch.Tensor:
    return (((1 - a) * lp + a * lq).exp() - (1 - a) * lp.exp() - a * lq.exp()) / (a * (a - 1))


def _alpha_slope(a: float, lp: torch.Tensor, lq: torch.Tensor) -> torch.Tensor:
    return (lp.exp() - ((1 - a) * lp + a * lq).exp()) / a


def _alpha_link(a: float, h: torch.Tensor) -> torch.Tensor:
    return -_expm1(-a * h) / a


def _mixture(b: float, lp: torch.Tensor, lq: torch.Tensor) -> torch.Tensor:
    """log(b reference + (1 - b) policy)."""
    return torch.logaddexp(lq + math.log(b), lp + math.log1p(-b))


def _jsd_summand(b: float, lp: torch.Tensor, lq: torch.Tensor) -> torch.Tensor:
    m = _mixture(b, lp, lq)
    return b * lq.exp() * (lq - m) + (1 - b) * lp.exp() * (lp - m)


def _jsd_slope(b: float, lp: torch.Tensor, lq: torch.Tensor) -> torch.Tensor:
    return (1 - b) * lp.exp() * (lp - _mixture(b, lp, lq))


def _skew_summand(a: float, lp: torch.Tensor, lq: torch.Tensor) -> torch.Tensor:
    return lq.exp() * (lq - _mixture(a, lp, lq))


def _skew_slope(a: float, lp: torch.Tensor, lq: torch.Tensor) -> torch.Tensor:
    return -(lq + lp + math.log1p(-a) - _mixture(a, lp, lq)).exp()


def _skew_reverse_summand(a: float, lp: torch.Tensor, lq: torch.Tensor) -> torch.Tensor:
    return lp.exp() * (lp - _mixture(1 - a, lp, lq))


def _skew_reverse_slope(a: float, lp: torch.Tensor, lq: torch.Tensor) -> torch.Tensor:
    m = _mixture(1 - a, lp, lq)
    return lp.exp() * (lp - m + 1 - (lp + math.log(a) - m).exp())


def _detached_summand(a: float, lp: torch.Tensor, lq: torch.Tensor) -> torch.Tensor:
    return lp.exp() * (lp - _mixture(1 - a, lp.detach(), lq))


def _detached_slope(a: float, lp: torch.Tensor, lq: torch.Tensor) -> torch.Tensor:
    return lp.exp() * (lp - _mixture(1 - a, lp, lq) + 1)


_NO_LINK = "no link has been published for it"

DIVERGENCES: dict[str, Divergence] = {
    "reverse_kl": Divergence(lambda lp, lq: lp.exp() * (lp - lq), lambda h: h, slope=lambda lp, lq: lp.exp() * (lp - lq + 1)),
    "forward_kl": Divergence(lambda lp, lq: lq.exp() * (lq - lp), lambda h: -_expm1(-h), slope=lambda lp, lq: -lq.exp()),
    "js": Divergence(_js_summand, _js_link, slope=_js_slope),
    "jeffreys": Divergence(
        lambda lp, lq: (lp.exp() - lq.exp()) * (lp - lq),
        lambda h: h - _expm1(-h),
        slope=lambda lp, lq: lp.exp() * (lp - lq + 1) - lq.exp(),
    ),
    "squared_hellinger": Divergence(lambda lp, lq: ((lp / 2).exp() - (lq / 2).exp()).square(), lambda h: -_expm1(-h / 2)),
    "chi2_kl": Divergence(
        lambda lp, lq: lq.exp() * torch.expm1(lp - lq).square() / 2 + lp.exp() * (lp - lq), lambda h: h + _expm1(h)
    ),
    "total_variation": Divergence(
        lambda lp, lq: 0.5 * (lp.exp() - lq.exp()).abs(),
        None,
        "f' is a step: not invertible, so no policy is its optimum",
        lambda lp, lq: 0.5 * lp.exp() * (lp - lq).sign(),
    ),
    "chi2": Divergence(
        lambda lp, lq: lq.exp() * torch.expm1(lp - lq).square(), None, "0 is in the domain of f' (theorem 1); use chi2_kl"
    ),
}
"""Name -> divergence, those without a parameter."""

FAMILIES: dict[str, Callable[[float], Divergence]] = {
    "alpha": lambda a: Divergence(partial(_alpha_summand, a), partial(_alpha_link, a), slope=partial(_alpha_slope, a)),
    "jsd": lambda b: Divergence(partial(_jsd_summand, b), None, _NO_LINK, partial(_jsd_slope, b)),
    "skew_kl": lambda a: Divergence(
        partial(_skew_summand, a), None, "0 is in the domain of f' (theorem 1)", partial(_skew_slope, a)
    ),
    "skew_reverse_kl": lambda a: Divergence(partial(_skew_reverse_summand, a), None, _NO_LINK, partial(_skew_reverse_slope, a)),
    "skew_reverse_kl_detached": lambda a: Divergence(
        partial(_detached_summand, a), None, _NO_LINK, partial(_detached_slope, a)
    ),
}
"""Name -> divergence of a parameter in (0, 1), written `name:<parameter>`."""


def _linked(name: str) -> bool:
    """Whether f-DPO is defined on the divergence or, of a family, on its members."""
    return (DIVERGENCES[name] if name in DIVERGENCES else FAMILIES[name](0.5)).link is not None


def _letter(family: str) -> str:
    """How the parameter of a family is called."""
    return "b" if family == "jsd" else "a"


def choices(*, link: bool = False) -> list[str]:
    """The names a user may write; with `link`, those on which f-DPO is defined."""
    plain = [name for name in DIVERGENCES if _linked(name) or not link]
    return plain + [f"{name}:<{_letter(name)}>" for name in FAMILIES if _linked(name) or not link]


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
            between = f"{head} takes its parameter after a colon, 0 < {_letter(head)} < 1, for example {head}:0.5"
            raise ValueError(between + _at_end(head, value))
        return FAMILIES[head](value)
    raise ValueError(f"unknown divergence{suggest(name, [*DIVERGENCES, *FAMILIES])} Possible: {', '.join(choices())}")


def _at_end(family: str, value: float) -> str:
    """What stands in for a family at 0 and 1, where it has no member; nothing elsewhere."""
    ends = {
        ("jsd", 0): "forward_kl, the limit of jsd:<b> / b,",
        ("jsd", 1): "reverse_kl, the limit of jsd:<b> / (1 - b),",
        ("skew_kl", 0): "forward_kl",
        ("skew_reverse_kl", 0): "reverse_kl",
        ("skew_reverse_kl_detached", 0): "reverse_kl",
    }
    return f"; {ends[family, value]} is meant by {family}:{value:g}" if (family, value) in ends else ""


def _with_link(name: str) -> str:
    entry = divergence(name)
    if entry.link is None:
        raise ValueError(f"not defined for preference learning: {entry.refused}. Possible: {', '.join(choices(link=True))}")
    return name


def _any(name: str) -> str:
    divergence(name)
    return name


def _schema(*, link: bool) -> WithJsonSchema:
    named = [name for name in DIVERGENCES if _linked(name) or not link]
    families = [name for name in FAMILIES if _linked(name) or not link]
    patterns = [{"type": "string", "pattern": f"^{name}:", "title": f"{name}:<{_letter(name)}>"} for name in families]
    return WithJsonSchema({"anyOf": [{"enum": named}, *patterns]})


LinkName = Annotated[str, AfterValidator(_with_link), _schema(link=True)]
"""Type of a setting that names a divergence with a link (f-DPO)."""

DivergenceName = Annotated[str, AfterValidator(_any), _schema(link=False)]
"""Type of a setting that names any divergence."""
