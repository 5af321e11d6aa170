"""Divergences as Triton reads them: the term of the sum at an item and its derivative in the policy's log-prob.

Each is that of the same name in `posttrain.divergences`, parameter included. `Separable.formula` names one.
"""

from __future__ import annotations

import triton
import triton.language as tl

FORMULAS = (
    "forward_kl",
    "reverse_kl",
    "jeffreys",
    "js",
    "total_variation",
    "alpha",
    "jsd",
    "skew_kl",
    "skew_reverse_kl",
    "skew_reverse_kl_detached",
)


@triton.jit
def mixture(lp, lq, share: tl.constexpr):
    """log(share q + (1 - share) p), where both may be too small for their exp."""
    larger = tl.maximum(lp, lq)
    return larger + tl.log(share * tl.exp(lq - larger) + (1 - share) * tl.exp(lp - larger))


@triton.jit
def formula(lp, lq, NAMES: tl.constexpr, PARAMETERS: tl.constexpr, WHICH: tl.constexpr):
    """(f, df / dlp) of one of the formulas at log-probs lp of the policy and lq of the reference."""
    NAME: tl.constexpr = NAMES[WHICH]
    A: tl.constexpr = PARAMETERS[WHICH]
    p, q = tl.exp(lp), tl.exp(lq)
    if NAME == "forward_kl":
        f, slope = q * (lq - lp), -q
    elif NAME == "reverse_kl":
        f, slope = p * (lp - lq), p * (lp - lq + 1)
    elif NAME == "jeffreys":
        f, slope = (p - q) * (lp - lq), p * (lp - lq + 1) - q
    elif NAME == "total_variation":
        f = 0.5 * tl.abs(p - q)
        slope = tl.where(lp > lq, 0.5 * p, tl.where(lp < lq, -0.5 * p, 0.0))
    elif NAME == "js":
        m = mixture(lp, lq, 0.5)
        f, slope = p * (lp - m) + q * (lq - m), p * (lp - m)
    elif NAME == "alpha":
        between = tl.exp((1 - A) * lp + A * lq)
        f, slope = (between - (1 - A) * p - A * q) / (A * (A - 1)), (p - between) / A
    elif NAME == "jsd":
        m = mixture(lp, lq, A)
        f, slope = A * q * (lq - m) + (1 - A) * p * (lp - m), (1 - A) * p * (lp - m)
    elif NAME == "skew_kl":
        m = mixture(lp, lq, A)
        f, slope = q * (lq - m), -(1 - A) * tl.exp(lq + lp - m)
    else:
        tl.static_assert(NAME == "skew_reverse_kl" or NAME == "skew_reverse_kl_detached")
        m = mixture(lp, lq, 1 - A)
        f, slope = p * (lp - m), p * (lp - m + 1)
        if NAME == "skew_reverse_kl":
            slope -= A * tl.exp(lp + lp - m)
    return f, slope
