"""The gradient of log-probs to the hidden states under a frozen head, in one pass over the vocabulary that keeps no logits.

With e_v = exp(z_v - m), m the largest logit so far and a its item, the sum over the other items

    s = sum_{v != a} e_v W_v          beside the state's          r = sum_{v != a} e_v

is carried from tile to tile as r is: rescaled when m grows, and then joined by the row of the item that was the largest until
then. At the end p_v = e_v / (1 + r), so that with y the token

    d log p_y / dx = W_y - sum_v p_v W_v = W_y - (s + W_a) / (1 + r),

where for y = a the two terms of W_a are joined to r / (1 + r) W_a: a token of probability near 1 keeps its digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .fold import Merge, State
from .head import Head
from .project import accumulate, exact_products, narrow, operand, row_factor


class Streamed:
    """Sums s of the terms of a head whose hidden states want a gradient.

    Args:
        head: the head; no soft-cap, whose slope changes within a row.
        needed: which terms' hidden states want one.
        rows: tokens of the largest block that `add` is given.
    """

    def __init__(self, head: Head, needed: list[bool], rows: int) -> None:
        self.head = head
        self.sums = [
            torch.zeros(x.shape, dtype=head.dtype, device=x.device) if need else None
            for (x, _), need in zip(head.terms, needed, strict=True)
        ]
        self.work = [None if s is None else s.new_empty(min(rows, len(s)), s.shape[1]) for s in self.sums]

    def add(self, weights: list[Tensor], e: Tensor, merge: Merge, rows: slice) -> None:
        """Take in a tile.

        Args:
            weights: of the tile, as operands.
            e: [n or more, C] exp of the tile's logits less its maximum, 0 at that.
            merge: how the tile went into the state.
            rows: the n tokens.
        """
        n = rows.stop - rows.start
        mine, other, beaten = (factor[:n, None] for factor in (merge.mine, merge.other, merge.beaten))
        for (x, weight), tile, total, work in zip(self.head.terms, weights, self.sums, self.work, strict=True):
            if total is None:
                continue
            with exact_products(x):
                product = accumulate(work[:n], narrow(e[:n], x), tile, add=False)
            total[rows].mul_(mine).addcmul_(product, other).addcmul_(self._weight(x, weight, merge.loser[:n]), beaten)

    def gradients(self, state: State, target: Tensor) -> list[Tensor | None]:
        """[N, H] of every term: the gradients of the log-probs of `target` [N], for upstream gradients of 1."""
        for (x, weight), total, work in zip(self.head.terms, self.sums, self.work, strict=True):
            if total is None:
                continue
            for first in range(0, len(target), max(len(work), 1)):  # a process may have no tokens
                rows = slice(first, min(first + len(work), len(target)))
                r, likeliest, token = state.r[rows, None], state.argmax[rows], target[rows]
                top, hit = 1 / (1 + r), (token == likeliest)[:, None]
                total[rows].mul_(-top).addcmul_(self._weight(x, weight, likeliest), torch.where(hit, r * top, -top))
                total[rows].addcmul_(self._weight(x, weight, token), (~hit).to(top.dtype))
                total[rows].mul_(row_factor(self.head, torch.ones_like(top), rows))
        return self.sums

    def _weight(self, x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        """[n, H] rows of a weight as the products see them."""
        return operand(weight.index_select(0, ids), x).to(self.head.dtype)
