"""Importance weights: policies that are not the one that sampled.

Between the policy and itself when the round was sampled stands the ratio policy / old of PPO, with gradient:

    surrogate = -min(ratio A, clip(ratio, 1 - low, 1 + high) A),   for A < 0 not above -dual A

Between the trainer and the engine that sampled, whose arithmetic differs, stands w = old / engine, which multiplies it without
gradient (d_t = log old - log engine at a token, a completion's S = sum and M = mean of d_t):

    token_truncate       min(e^d, C), and not below its lower bound
    token_mask           e^d, 0 out of bounds
    sequence_truncate    e^S in bounds, at all tokens
    sequence_mask        e^S, 0 out of bounds: the longer a completion, the sooner
    sequence_mean_mask   e^M, 0 out of bounds
    geometric_filter     1, or 0 where e^M is out of bounds

Source: Schulman et al. 2017, arXiv:1707.06347 (clip); Ye et al. 2020, arXiv:1912.09729 (dual); Yu et al. 2025, "DAPO",
arXiv:2503.14476 (two bounds); Ahmadian et al. 2024, arXiv:2402.14740 (a ratio per completion); Zheng et al. 2025, "GSPO",
arXiv:2507.18071 (its geometric mean). Truncation: Ionides 2008; Yao et al. 2025, "Your efficient RL framework secretly brings
you off-policy RL training"; token_mask: Ling Team 2025, "IcePop", arXiv:2510.18855.

Letters in shape comments: B completions, N tokens of all of them end to end.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .stats import Completions

_LARGEST = 20.0
"""e^20 is as good as infinite for a ratio, and far from the end of float32."""

BOUNDS: Mapping[str, tuple[float, float]] = {
    "token_truncate": (0.0, 2.0),
    "token_mask": (0.5, 5.0),
    "sequence_truncate": (0.0, 2.0),
    "sequence_mask": (0.0, 3.0),
    "sequence_mean_mask": (0.0, 3.0),
    "geometric_filter": (0.999, 1.001),
}
"""Correction -> its usual bounds."""


def power(x: torch.Tensor, *, minus_one: bool = False) -> torch.Tensor:
    """e^x, or e^x - 1, continued linearly beyond x = 20: exact below, finite and with a gradient above."""
    inside = x.clamp(max=_LARGEST)
    grown = inside.exp()
    return (torch.expm1(inside) if minus_one else grown) + grown * (x - inside)


def ratio(one: Completions, old_logps: torch.Tensor, level: str) -> torch.Tensor:
    """[N] policy / old at each token, with gradient; exactly 1 where the two are equal.

    Args:
        level: `token`; `sequence`, the product over the completion at all its tokens; `sequence_mean`, its geometric mean.
    """
    d = one.logps.to(old_logps.dtype) - old_logps
    if level != "token":
        d = one.spread(one.sum(d) if level == "sequence" else one.mean(d))
    return power(d)


def surrogate(
    ratio: torch.Tensor, advantages: torch.Tensor, low: float | None, high: float | None, dual: float | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """[N] the clipped loss of each token, and [N] each, by name: 1 where it was clipped, which leaves it no gradient.

    Args:
        low, high: how far below and above 1 a ratio counts; None: however far.
        dual: where the advantage is negative no ratio counts as more than this.
    """
    least = None if low is None else 1 - low
    most = None if high is None else 1 + high
    free = -ratio * advantages
    bounded = free if least is most is None else -ratio.clamp(least, most) * advantages
    losses = torch.maximum(free, bounded)
    there = ratio.detach()
    clipped = {
        "clip/low": there.new_zeros(there.shape) if least is None else (there < least) & (advantages < 0),
        "clip/high": there.new_zeros(there.shape) if most is None else (there > most) & (advantages > 0),
    }
    if dual is not None:
        capped = -dual * advantages
        clipped["clip/dual"] = (advantages < 0) & (losses.detach() > capped)
        losses = torch.where(advantages < 0, torch.minimum(losses, capped), losses)
    return losses, {name: share.to(there.dtype) for name, share in clipped.items()}


def correction(one: Completions, engine_logps: torch.Tensor, mode: str, bounds: tuple[float, float]) -> torch.Tensor:
    """[N] what each token counts, without gradient.

    Args:
        one: with the trainer's log-probs of the round.
        engine_logps: [N] those of the engine.
        mode: a name in `BOUNDS`.
        bounds: the lower and the upper one.
    """
    low, high = bounds
    d = (one.logps - engine_logps.to(one.logps.dtype)).detach()
    if mode in ("sequence_truncate", "sequence_mask"):
        d = one.spread(one.sum(d))
    elif mode != "token_truncate" and mode != "token_mask":
        d = one.spread(one.mean(d))
    weight = d.exp()
    if mode.endswith("truncate"):
        return weight.clamp(low, high)
    inside = (weight >= low) & (weight <= high)
    return inside.to(d.dtype) if mode == "geometric_filter" else torch.where(inside, weight, 0)


def mismatch(one: Completions, engine_logps: torch.Tensor) -> dict[str, torch.Tensor]:
    """How far engine and trainer are apart, before anything is cut: [N], and [B] of completions.

    `mismatch/gap` is |d|; k1 and k3 estimate KL(engine || trainer); `mismatch/weight` is e^d, with its largest and the share of
    tokens that is effective. The trainer logs e^|d|.
    """
    d = (one.logps - engine_logps.to(one.logps.dtype)).detach()
    weight = power(d)
    return {
        "mismatch/gap": d.abs(),
        "mismatch/k1": -d,
        "mismatch/k3": power(d, minus_one=True) - d,
        **{f"mismatch/weight{ending}": weight for ending in ("", "/max", "/ess")},
        "mismatch/weight_of_completion": power(one.sum(d)),
    }
