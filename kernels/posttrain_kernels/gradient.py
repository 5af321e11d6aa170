"""The derivative of any mix of statistics with respect to the logits: one expression with coefficients per token.

Every statistic here is S = sum_v f(l_v, q_v) of the log-probs l of the policy and q of the reference, or a function of such
sums, and dS/dz_v = f_l(v) - p_v sum_w f_l(w). Summed over the statistics with their upstream gradients u, at item v

    dz_v = p_v (c0 + c1 l_v + c2 p_v) + [v = id] add_id                       one head
         + sum u (f_l(v) - p_v C)                                             two heads, C = sum_w f_l(w) from the forward

A `Rowwise` f is no sum, but the same holds with f_l(v) its derivative in l_v; `row_slope` takes it from whole rows.

At the maximum of the row, the one item whose p may be close to 1, the one-head sum would cancel; it is replaced there by
`at_max`, written with 1 - p_max = r / (1 + r) from the state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .fold import State, locate
from .head import FLOOR, Rowwise, Separable


def slope(divergence: Separable, lp: Tensor, lq: Tensor) -> Tensor:
    """f_l(lp, lq) elementwise, 0 where lp is at the floor; new memory."""
    if divergence.slope is not None:
        derivative = divergence.slope(lp, lq)
    else:
        with torch.enable_grad():
            lp = lp.detach().requires_grad_()
            (derivative,) = torch.autograd.grad(divergence.f(lp, lq).sum(), lp)
    return derivative.masked_fill(lp <= FLOOR, 0)


def row_slope(
    entry: Rowwise, lp: Tensor, lq: Tensor | None, target: Tensor | None, upstream: Tensor
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Values [n] of a Rowwise by name, and [n, C] upstream * f_l, 0 where lp is at the floor (None: it is constant in lp)."""
    with torch.enable_grad():
        lp = lp.detach().requires_grad_()
        values, others = entry(lp, lq, target)
        found = {entry.name: values.detach(), **others}
        if not values.requires_grad:
            return found, None
        (derivative,) = torch.autograd.grad(values, lp, upstream.to(values.dtype), allow_unused=True)
    return found, None if derivative is None else derivative.masked_fill(lp <= FLOOR, 0)


@dataclass
class Coefficients:
    """Per-token coefficients for N tokens; a part that no upstream gradient needs is None."""

    factor: Tensor
    """[N, 1] multiplies the whole row, so it can go to the hidden states instead of the tile."""

    c0: Tensor | None
    """[N, 1]; None is 1 where `at_max` is given."""

    c1: Tensor | None
    """[N, 1]"""

    c2: Tensor | None
    """[N, 1]"""

    at_max: Tensor | None
    """[N, 1] the one-head sum at the maximum; None where there is no one-head part."""

    argmax: Tensor
    """[N, 1]"""

    lse: Tensor
    """[N, 1] of the policy's own vocabulary."""

    ids: Tensor
    """[N, K]"""

    add: Tensor | None
    """[N, K] what is added at ids; 0 where the id is the maximum."""

    common: Tensor
    """[N, 1] log sum exp of the policy over the common vocabulary."""

    reference: Tensor | None
    """[N, 1] that of the reference."""

    pairs: dict[str, tuple[Tensor, Tensor]]
    """Two-head statistic that is a sum -> (upstream [N, 1], C [N, 1])."""

    rowwise: dict[str, Tensor]
    """Rowwise statistic -> upstream [N]; not part of `tile`."""

    def rows(self, rows: slice) -> Coefficients:
        """Views of some tokens."""
        pairs = {name: (u[rows], c[rows]) for name, (u, c) in self.pairs.items()}
        rowwise = {name: u[rows] for name, u in self.rowwise.items()}
        names = [field.name for field in dataclasses.fields(self) if field.name not in ("pairs", "rowwise")]
        values = {name: getattr(self, name) for name in names}
        parts = {name: None if value is None else value[rows] for name, value in values.items()}
        return Coefficients(**parts, pairs=pairs, rowwise=rowwise)

    def tile(self, z: Tensor, zq: Tensor | None, start: int, divergences: Mapping[str, Separable]) -> Tensor:
        """[N, C] dz / factor for the items from `start`; overwrites z and zq, the logits of the two heads there.

        zq is None on tiles beyond the common vocabulary.
        """
        extra = self._pair_tile(z, zq, divergences) if zq is not None and self.pairs else None
        if self.at_max is None:
            return z.zero_() if extra is None else extra
        lp = z.sub_(self.lse)
        if self.c1 is None and self.c2 is None:
            dz = lp.exp_()
            if self.c0 is not None:
                dz.mul_(self.c0)
        else:
            p = lp.exp()
            dz = lp.clamp_(min=FLOOR).mul_(0 if self.c1 is None else self.c1)
            if self.c2 is not None:
                dz.addcmul_(p, self.c2)
            if self.c0 is not None:
                dz.add_(self.c0)
            dz.mul_(p)
        columns, inside = locate(self.argmax, start, z.shape[1])
        dz.scatter_(1, columns, torch.where(inside, self.at_max, dz.gather(1, columns)))
        if self.add is not None:
            columns, inside = locate(self.ids, start, z.shape[1])
            dz.scatter_add_(1, columns, torch.where(inside, self.add, 0))
        return dz if extra is None else dz.add_(extra)

    def _pair_tile(self, z: Tensor, zq: Tensor, divergences: Mapping[str, Separable]) -> Tensor:
        lp, lq = (z - self.common).clamp_(min=FLOOR), zq.sub_(self.reference).to(z.dtype).clamp_(min=FLOOR)
        p = lp.exp()
        parts = (slope(divergences[name], lp, lq).addcmul_(p, c, value=-1).mul_(u) for name, (u, c) in self.pairs.items())
        total = next(parts)
        for part in parts:
            total.add_(part)
        return total


def coefficients(
    upstream: Mapping[str, Tensor],
    state: State,
    target: Tensor | None,
    index: Tensor | None,
    reference: Tensor | None,
    sums: Mapping[str, Tensor],
    rowwise: Collection[str],
) -> Coefficients:
    """The coefficients for upstream gradients by name ([N]; gather [N, K]).

    Args:
        state: of the policy, complete.
        reference: [N] log sum exp of the reference over the common vocabulary.
        sums: [N] C of each two-head statistic that is a sum.
        rowwise: names of the Rowwise statistics.
    """
    factor = torch.ones_like(state.m)
    if len(upstream) == 1 and "gather" not in upstream:
        ((name, factor),) = upstream.items()
        upstream = {name: torch.ones_like(factor)}
    c0, c1, c2, at_max = (torch.zeros_like(state.m) for _ in range(4))
    ids, add = [], []
    top, rest = 1 / (1 + state.r), state.r / (1 + state.r)  # p and 1 - p of the maximum
    for name, u in upstream.items():
        match name:
            case "logp" | "gather":
                at, weight = (target[:, None], u[:, None]) if name == "logp" else (index, u)
                hit = at == state.argmax[:, None]
                total, hits = weight.sum(1), (weight * hit).sum(1)
                c0 -= total
                at_max += hits * rest - (total - hits) * top
                ids.append(at)
                add.append(weight.masked_fill(hit, 0))
            case "max_logp":
                c0 -= u
                at_max += u * rest
            case "lse":
                c0 += u
                at_max += u * top
            case "entropy":
                c1 -= u
                c0 -= u * (state.r.log1p() - state.e1 * top)
                at_max += u * state.e1 * top.square()
            case "log_sum_p2":
                c2 += 2 * u * (1 + state.r).square() / (1 + state.e2)
                c0 -= 2 * u
                at_max += 2 * u * top * (state.r - state.e2) / (1 + state.e2)
    pairs = {name: (u[:, None], sums[name][:, None]) for name, u in upstream.items() if name in sums}
    rows = {name: u for name, u in upstream.items() if name in rowwise}
    only_p = set(upstream) == {"logp"}  # c0 = -1: the sign goes to the factor, and the tile is p itself
    sign = -1 if only_p else 1
    return Coefficients(
        factor=sign * factor[:, None],
        c0=None if only_p else c0[:, None],
        c1=c1[:, None] if "entropy" in upstream else None,
        c2=c2[:, None] if "log_sum_p2" in upstream else None,
        at_max=None if len(pairs) + len(rows) == len(upstream) else sign * at_max[:, None],
        argmax=state.argmax[:, None],
        lse=state.lse[:, None],
        ids=torch.cat(ids, 1) if ids else state.argmax[:, None],
        add=sign * torch.cat(add, 1) if ids else None,
        common=state.common[:, None],
        reference=None if reference is None else reference[:, None],
        pairs=pairs,
        rowwise=rows,
    )
