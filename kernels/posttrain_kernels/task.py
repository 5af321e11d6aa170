"""What the loops work on: how they are cut, the inputs of a call, what its passes leave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .fold import Merge, State
from .head import Head, Rowwise, Separable, common
from .project import accumulate, narrow, operand

if TYPE_CHECKING:
    from .gradient import Coefficients

Block = tuple[slice, slice]
"""(tokens, the same with padding)"""


@dataclass(frozen=True)
class Sizes:
    """How the loops are cut. Depends on device, dtype, vocabulary and workspace, never on N."""

    rows: int
    """Tokens of one product in the forward, so that a token's logits have the same bits in any batch."""

    pad: int
    """The last product of a forward is padded to a multiple of this."""

    items: int
    """Items of a tile."""

    block: int
    """Tokens folded at a time."""

    kept: int
    """Tokens folded at a time where their logits are kept over the whole vocabulary."""

    chunk: int
    """Tokens of a backward chunk."""

    whole: int
    """Tokens whose rows a Rowwise sees at a time."""

    def blocks(self, n: int, tokens: int) -> list[Block]:
        """Forward blocks of so many tokens."""
        starts = range(0, n, tokens)
        padded = [min(tokens, -(-(n - start) // self.pad) * self.pad) for start in starts]
        return [(slice(s, min(s + p, n)), slice(s, s + p)) for s, p in zip(starts, padded, strict=True)]

    def chunks(self, n: int) -> list[slice]:
        """Backward chunks of n tokens, of nearly equal length."""
        count = -(-n // self.chunk)
        return [slice(n * i // count, n * (i + 1) // count) for i in range(count)]

    def tiles(self, size: int, edge: int) -> list[tuple[int, int]]:
        """(start, stop) of every tile; one begins at the `edge` of the common vocabulary."""
        spans = ((0, edge), (edge, size))
        return [(s, min(s + self.items, stop)) for begin, stop in spans for s in range(begin, stop, self.items)]


@dataclass(frozen=True)
class Passes:
    """Who goes over the elements of a tile: torch (kept.py) or Triton (fused.py). The loops around are the same.

    `raw` says in which form the policy's tiles come to all three: as logits, or as the products that give them.
    """

    fold: Callable[[Head | None, State, Tensor, int, slice, Tensor, Tensor], Merge | None]
    """(head if the tile is raw, state, tile, first item, tokens, ids, scratch): `State.fold`; None where scratch is not as
    that leaves it."""

    divergences: Callable[[Task, Result, slice, list[list[Tensor]]], None]
    """(task, result, tokens, tiles of both heads): add the values and, if asked for, C of the divergences to the result."""

    gradient: Callable[[Task, Coefficients, Tensor, Tensor | None, int, slice], Tensor]
    """(task, coefficients, tile, tile of the ref or None, first item, tokens) -> [n, C] derivative in the products but for the
    row factor, in the dtype of the logits or of the operands; overwrites both tiles."""

    temporaries: int
    """Tiles that a fold, or a gradient, needs at once."""

    alone: int
    """Tiles that the gradient of log-probs alone needs at once."""

    raw: bool = False

    streams: bool = False
    """Whether `fold` says how a tile went in, which streamed.py needs."""


@dataclass(frozen=True)
class Task:
    """Inputs of one call, as the loops see them."""

    head: Head
    ref: Head | None
    target: Tensor | None
    """[N], if a wanted statistic reads it."""

    index: Tensor | None
    """[N, K], if gather is wanted."""

    names: Sequence[str]
    """What is wanted."""

    divergences: Mapping[str, Separable]
    """The two-head statistics that need the logits of both."""

    rowwise: Mapping[str, Rowwise]
    """The statistics that need whole rows."""

    sizes: Sizes

    passes: Passes

    @property
    def edge(self) -> int:
        """Size of the common vocabulary, the head's own without a ref."""
        return self.head.size if self.ref is None else common(self.head, self.ref)

    def tiles(self, head: Head) -> list[tuple[int, int]]:
        """The tiles of one of the heads."""
        return self.sizes.tiles(head.size, self.edge)


@dataclass(frozen=True)
class Need:
    """Which tensors of the head want a gradient."""

    x: list[bool]
    """Of every term."""

    weight: list[bool]
    """Of every term."""

    bias: bool

    @classmethod
    def of(cls, head: Head) -> Need:
        """As things stand."""
        wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in head.tensors]
        return cls(x=wanted[2::2], weight=wanted[3::2], bias=wanted[0])

    @property
    def head(self) -> bool:
        """Whether the head itself is trained."""
        return self.bias or any(self.weight)

    @property
    def any(self) -> bool:
        """Whether anything is."""
        return self.head or any(self.x)


@dataclass
class Gradients:
    """Gradients of the tensors of a head; None for what needs none."""

    x: list[Tensor | None]
    """[N, H_i] of every term."""

    weight: list[Tensor | None]
    """[V, H_i] of every term."""

    bias: Tensor | None
    """[V]"""

    @classmethod
    def zeros(cls, head: Head, need: Need) -> Gradients:
        """Sums to add to, in the dtype of the logits."""

        def sums(like: Tensor, needed: bool) -> Tensor | None:
            return torch.zeros(like.shape, dtype=head.dtype, device=like.device) if needed else None

        return cls(
            [sums(x, needed) for (x, _), needed in zip(head.terms, need.x, strict=True)],
            [sums(weight, needed) for (_, weight), needed in zip(head.terms, need.weight, strict=True)],
            sums(head.bias, True) if need.bias else None,
        )

    def scaled(self, head: Head, rows: slice, factor: Tensor) -> list[Tensor | None]:
        """[n, H_i] x times the factor [n, 1] of the tokens `rows`, as operands, of every term whose weight needs a gradient."""
        return [
            None if dw is None else operand(x[rows].to(factor.dtype) * factor, x)
            for (x, _), dw in zip(head.terms, self.weight, strict=True)
        ]

    def add_tile(
        self,
        head: Head,
        weights: list[Tensor],
        dz: Tensor,
        rows: slice,
        start: int,
        factor: Tensor,
        scaled: list[Tensor | None],
    ) -> None:
        """Add to sums what a tile of derivatives in the logits gives; what goes to x still lacks the factor.

        Args:
            weights: of the tile, as operands.
            dz: [n, C] derivatives over `factor`, for the tokens `rows` and the items from `start`.
            factor: [n, 1]
            scaled: what the function of this name gives for them.
        """
        items = slice(start, start + dz.shape[1])
        if self.bias is not None:
            self.bias[items].addmv_(dz.mT, factor.squeeze(1))  # a policy with a bias has dz in the dtype of the logits
        for (x, _), right, weight, dx, dw in zip(head.terms, scaled, weights, self.x, self.weight, strict=True):
            narrowed = narrow(dz, x)
            if dx is not None:
                accumulate(dx[rows], narrowed, weight, add=True)
            if dw is not None:
                accumulate(dw[items], narrowed.mT, right, add=True)

    def like(self, head: Head) -> list[Tensor | None]:
        """In the order and the dtypes of `head.tensors`; the temperature has none."""
        found = [self.bias, None, *(tensor for term in zip(self.x, self.weight, strict=True) for tensor in term)]
        return [None if d is None else d.to(own.dtype) for d, own in zip(found, head.tensors, strict=True)]


@dataclass
class Result:
    """What a forward pass leaves."""

    state: State
    """Of the policy."""

    reference: Tensor | None
    """[N] log sum exp of the reference over the common vocabulary."""

    values: dict[str, Tensor]
    """[N] each: divergences and Rowwise statistics."""

    sums: dict[str, Tensor]
    """[N] each: C of the divergences, for their gradients (gradient.py)."""

    unit: Gradients | None
    """Of the statistic whose gradient is taken in the forward, for upstream gradients of 1."""

    held: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """(start, stop) -> [N or more, C] that tile of the policy, as the passes read it; a backward uses it up."""
