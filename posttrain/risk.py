"""Risk measures of how far a policy's distribution over the vocabulary is from the reference's at one token.

They are measures of Z(v) = log reference(v) - log policy(v) with v drawn from the reference, whose mean is
KL(reference || policy). Letters: n tokens, V items, p = policy, q = reference, lp and lq their logs, mu the level.

    cvar_upper = (1/mu) * (integral of Z over the share mu of q where Z is largest)          >= KL, = KL at mu = 1
    cvar_lower = (1/mu) * (integral of Z over the share mu of q where Z is smallest)         <= KL, = KL at mu = 1
    erm_upper = (1/mu) * log E_q e^(mu Z) = (1/mu) * log sum_v q^(1 + mu) p^-mu              >= KL, -> KL as mu -> 0
    erm_lower = -(1/mu) * log E_q e^(-mu Z) = -(1/mu) * log sum_v q^(1 - mu) p^mu            <= KL, -> KL as mu -> 0
    official = sum of q Z over the items with Z above the (1 - mu)-quantile of the V values of Z

cvar (conditional value at risk) is exact: the item at which mu is reached counts in part, several with the same Z in the same
proportion. erm (entropic risk) are the Renyi divergences of order 1 + mu and 1 - mu from reference to policy; erm_lower is
(1 - mu)/mu times the one of order mu from policy to reference, so 0 at mu = 1 and not above 0 beyond. official is what the
authors' code calls cvar: its quantile counts every item once, whatever its probability, and what is kept is not divided by its
mass; it is the KL but for the items it drops, so above it where their Z is below 0.

Source: Rockafellar and Uryasev 2000, "Optimization of conditional value-at-risk" (cvar); Follmer and Schied 2002, "Convex
measures of risk and trading constraints" (erm); Ra-DPO: Zhang et al. 2025, arXiv:2505.20359, eq. 17 to 21, and its authors'
code (official).

All take whole rows of finite log-probs, lp and lq [n, V], and return [n], differentiable in lp by autograd; which items are
taken is a constant of the differentiation, as it is almost everywhere. Each row is the only thing its value depends on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_BINS = 1024
"""Bins of a histogram: two rounds narrow a float32 quantile to its value."""

_AT_ONCE = 1 << 19
"""Numbers of a block of rows on a CPU, so that what is made of it stays in the cache; elsewhere all rows are taken at once."""

_LARGEST = 60.0
"""Exponents up to here are taken as they are: e^60 times any probability is far from the end of float32."""


def kl(lp: torch.Tensor, lq: torch.Tensor) -> torch.Tensor:
    """[n] KL(reference || policy), the mean of Z."""
    return (lq.exp() * (lq - lp)).sum(-1)


def cvar_upper(lp: torch.Tensor, lq: torch.Tensor, mu: float) -> torch.Tensor:
    """[n] mean of Z over the share `mu` (0 < mu <= 1) of the reference's probability where Z is largest."""
    return kl(lp, lq) if mu == 1 else _taken(lp, lq, lambda z, q: _tail(z, q, mu)) / mu


def cvar_lower(lp: torch.Tensor, lq: torch.Tensor, mu: float) -> torch.Tensor:
    """[n] mean of Z over the share `mu` (0 < mu <= 1) of the reference's probability where Z is smallest."""
    return kl(lp, lq) if mu == 1 else _taken(lp, lq, lambda z, q: _tail(-z, q, mu)) / mu


def erm_upper(lp: torch.Tensor, lq: torch.Tensor, mu: float) -> torch.Tensor:
    """[n] entropic risk of Z at level `mu` > 0."""
    return _log_mean_exp(lp, lq, mu) / mu


def erm_lower(lp: torch.Tensor, lq: torch.Tensor, mu: float) -> torch.Tensor:
    """[n] entropic risk of -Z at level `mu` > 0, negated."""
    return _log_mean_exp(lp, lq, -mu) / -mu


def official(lp: torch.Tensor, lq: torch.Tensor, level: float, split: bool) -> torch.Tensor:
    """[n] what the authors' code computes.

    Args:
        level: its confidence level, between 0 and 1.
        split: take the two halves of the vocabulary apart, each with its own quantile.
    """
    size = lp.shape[-1]
    parts = [slice(0, size // 2), slice(size // 2, size)] if split else [slice(0, size)]

    def kept(z: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return q * torch.cat([z[:, part] > _plain_quantile(z[:, part], 1 - level) for part in parts], 1)

    return _taken(lp, lq, kept)


def _taken(lp: torch.Tensor, lq: torch.Tensor, weights: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """[n] sum of Z with `weights` (Z, q) -> [n, V], which are held constant."""
    step = max(_AT_ONCE // lp.shape[-1], 1) if lp.device.type == "cpu" else max(len(lp), 1)
    with torch.no_grad():
        blocks = zip(lp.split(step), lq.split(step), strict=True)
        weight = torch.cat([weights(ours - theirs, ours.exp()) for theirs, ours in blocks])
    return (weight * (lq - lp)).sum(-1)


def _tail(z: torch.Tensor, q: torch.Tensor, mu: float) -> torch.Tensor:
    """[n, V] the part of each item's mass q that belongs to the share `mu` of all of it with the largest z."""
    mass = mu * q.sum(1, keepdim=True)
    quantile = _quantile(z, q, mass)
    # a comparison written as numbers: a tensor of booleans in `where` or a product is many times slower on a CPU
    above = torch.gt(z, quantile, out=torch.empty_like(z)).mul_(q)
    equal = torch.eq(z, quantile, out=torch.empty_like(z)).mul_(q)
    part = (mass - above.sum(1, keepdim=True)) / equal.sum(1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)
    return above.addcmul_(equal, part.clamp(0, 1))


def _quantile(z: torch.Tensor, q: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """[n, 1] the smallest value of z above which lies at most `mass` [n, 1] of q.

    A histogram of each row's mass says in which bin that is; then only the items of this bin are left, a few per row, and so on
    until all of them are equal. Every round at least parts the smallest from the largest, so it ends; ties end together.
    """
    while True:
        low, high = z.amin(1, keepdim=True), z.amax(1, keepdim=True)
        width = high - low
        if not ((width > 0) & width.isfinite()).any():
            return low
        bins = ((z - low) / (width + (width == 0))).mul_(_BINS - 1).long().clamp_(0, _BINS - 1)
        inside = q.new_zeros(len(q), _BINS).scatter_add_(1, bins, q)
        upward = inside.flip(1).cumsum(1).flip(1)  # mass of a bin and of those above it, falls from left to right
        at = (upward > mass).sum(1, keepdim=True).sub_(1).clamp_(min=0)
        mass = (mass - (upward - inside).gather(1, at)).clamp_(min=0)
        z, q = _compact(z, q, bins == at)


def _compact(z: torch.Tensor, q: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The items to keep, at least one a row, moved together: [n, m] each, filled up with items of no mass."""
    row, item = keep.nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=len(z))
    starts = counts.cumsum(0) - counts
    values, place = z[row, item], torch.arange(len(row), device=z.device) - starts[row]
    kept = values[starts, None].repeat(1, int(counts.max()))
    mass = torch.zeros_like(kept)
    kept[row, place], mass[row, place] = values, q[row, item]
    return kept, mass


def _plain_quantile(z: torch.Tensor, share: float) -> torch.Tensor:
    """[n, 1] torch.quantile(z, share, dim=1, keepdim=True) to the last bit, without its sort and its limit of size."""
    rank = torch.tensor(share, dtype=z.dtype) * (z.shape[1] - 1)
    below, above = (z.kthvalue(int(k) + 1, dim=1, keepdim=True).values for k in (rank.floor(), rank.ceil()))
    return torch.lerp(below, above, (rank - rank.floor()).to(z.device))


def _log_mean_exp(lp: torch.Tensor, lq: torch.Tensor, by: float) -> torch.Tensor:
    """[n] log E_q e^(by Z).

    At a level below 1 and near 0 it is taken from E_q e^(by Z) - 1, whose rounding errors are relative to itself, so that
    dividing by the level does not enlarge them.
    """
    exponent = by * (lq - lp)
    far = torch.logsumexp(lq + exponent, -1) - torch.logsumexp(lq, -1)
    if abs(by) >= 1:
        return far
    excess = (lq.exp() * torch.expm1(exponent.clamp(max=_LARGEST))).sum(-1)
    near = (excess.abs() < 0.5) & (exponent.amax(-1) < _LARGEST)
    return torch.where(near, excess.clamp(-0.5, 0.5).log1p(), far)
