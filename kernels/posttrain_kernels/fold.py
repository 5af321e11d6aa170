"""What is remembered of a token while its logits go by, tile after tile of the vocabulary.

With m the largest logit so far and e_v = exp(z_v - m), the state holds r = sum of e_v without the maximum's own term, so that

    log sum exp z = m + log1p(r),    p_max = 1 / (1 + r),    1 - p_max = r / (1 + r)

keep full relative precision when one item holds nearly all the probability, where m + log(s) with s = 1 + r has lost r.
All other sums are kept relative to m too, and two states merge exactly (`fold` merges the state of one tile into the total).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from .head import FLOOR


@dataclass(frozen=True)
class Merge:
    """How the state of a tile went into the total: both sums of e are brought to the new maximum by these factors [N]."""

    mine: Tensor
    """Of the total so far."""

    other: Tensor
    """Of the tile."""

    beaten: Tensor
    """e of the one of the two maxima that is not the new one, which now enters the sum."""

    loser: Tensor
    """Its id."""


@dataclass
class State:
    """State of N tokens; a sum that no wanted statistic needs is None. All of the logits' dtype but `argmax`."""

    m: Tensor
    """[N] largest logit."""

    r: Tensor
    """[N] sum of e_v without the maximum's own 1."""

    argmax: Tensor
    """[N] int64 id of the first item with that logit."""

    at: Tensor
    """[N, K] logits at the ids asked for; nan until their tile has passed."""

    e1: Tensor | None
    """[N] sum of e_v (z_v - m), for the entropy."""

    e2: Tensor | None
    """[N] sum of e_v^2 without the maximum's own 1, for sum p^2."""

    common: Tensor
    """[N] log sum exp over the common vocabulary of two heads, once its last tile has passed."""

    @classmethod
    def empty(cls, ids: Tensor, dtype: torch.dtype, want: set[str]) -> State:
        """The state before any tile; ids [N, K] are those whose logits are kept."""
        n, device = ids.shape[0], ids.device
        m = torch.full((n,), torch.finfo(dtype).min, dtype=dtype, device=device)
        at = torch.full(ids.shape, torch.nan, dtype=dtype, device=device)
        e1, e2 = (torch.zeros_like(m) if name in want else None for name in ("entropy", "log_sum_p2"))
        return cls(m, torch.zeros_like(m), torch.zeros_like(m, dtype=torch.int64), at, e1, e2, torch.zeros_like(m))

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The fields in order, for `save_for_backward`."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def rows(self, rows: slice) -> State:
        """Views of some tokens."""
        return State(*(None if value is None else value[rows] for value in self.tensors()))

    def fold(self, z: Tensor, start: int, ids: Tensor, scratch: Tensor) -> Merge:
        """Take in one tile of logits.

        Args:
            z: [N, C] logits of the items from `start`.
            ids: [N, K] whose logits are kept.
            scratch: [N, C] overwritten; may be z itself. Unless `e2` is summed, e of the tile is left there, 0 at its maximum.
        """
        columns, inside = locate(ids, start, z.shape[1])
        self.at.copy_(torch.where(inside, z.gather(1, columns), self.at))
        m, argmax = row_max(z)
        m.clamp_(min=torch.finfo(z.dtype).min)  # a tile of -inf only: keeps z - m = -inf, not nan
        e = torch.sub(z, m[:, None], out=scratch)
        e1 = e2 = None
        if self.e1 is not None:
            d = e.clamp(min=FLOOR)
            e1 = d.mul_(e.exp_()).sum(-1)
        else:
            e.exp_()
        e.scatter_(1, argmax[:, None], 0)
        r = e.sum(-1)
        if self.e2 is not None:
            e2 = e.square_().sum(-1)
        return self._merge(m, r, argmax + start, e1, e2)

    def _merge(self, m: Tensor, r: Tensor, argmax: Tensor, e1: Tensor | None, e2: Tensor | None) -> Merge:
        new = torch.maximum(self.m, m)
        shifts = (self.m - new).clamp_(min=FLOOR), (m - new).clamp_(min=FLOOR)
        mine, other = shifts[0].exp(), shifts[1].exp()
        beaten = torch.minimum(mine, other)  # one of the two maxima stays out of the sum, this one enters it
        if e1 is not None:
            self.e1.add_(shifts[0] * (1 + self.r)).mul_(mine).add_(other * (e1 + shifts[1] * (1 + r)))
        if e2 is not None:
            self.e2.mul_(mine.square()).add_(e2 * other.square()).add_(beaten.square())
        self.r.mul_(mine).add_(r * other).add_(beaten)
        grown = m > self.m
        merge = Merge(mine, other, beaten, torch.where(grown, self.argmax, argmax))
        self.argmax.copy_(torch.where(grown, argmax, self.argmax))
        self.m.copy_(new)
        return merge

    @property
    def lse(self) -> Tensor:
        """[N] log sum exp of the logits."""
        return self.m + self.r.log1p()

    def logps(self) -> Tensor:
        """[N, K] log-probs at the ids asked for."""
        return (self.at - self.m[:, None]) - self.r.log1p()[:, None]

    def read(self, name: str, first: int) -> Tensor:
        """A finished one-head statistic; ids from column `first` on are those of `gather`, the target stands before them."""
        match name:
            case "logp":
                return self.logps()[:, 0]
            case "gather":
                return self.logps()[:, first:]
            case "lse":
                return self.lse
            case "entropy":
                return self.r.log1p() - self.e1 / (1 + self.r)
            case "log_sum_p2":
                return self.e2.log1p() - 2 * self.r.log1p()
            case "max_logp":
                return -self.r.log1p()
            case _:
                return self.argmax.clone()


def row_max(z: Tensor) -> tuple[Tensor, Tensor]:
    """[N] maximum of each row and its first index; in two steps, as a CPU vectorises a maximum but not its index."""
    n, size = z.shape
    if size % 64 or not n:
        return z.max(-1)
    groups = z.view(n, -1, 64)
    m, group = groups.amax(-1).max(-1)
    members = groups.gather(1, group[:, None, None].expand(n, 1, 64)).squeeze(1)
    return m, members.argmax(-1) + 64 * group


def locate(ids: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """Columns of ids [N, K] in the tile of `size` items from `start`, and whether they are in it (else the column is valid)."""
    columns = ids - start
    inside = (columns >= 0) & (columns < size)
    return columns.clamp_(0, size - 1), inside
