"""What goes into the kernel: a head (how hidden states become logits) and the statistics asked of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ONE_HEAD = ("logp", "lse", "entropy", "log_sum_p2", "max_logp", "argmax", "gather")
"""Statistics of the policy alone."""

TWO_HEADS = ("ref_logp", "ref_lse", "forward_kl", "reverse_kl")
"""Statistics that also read `ref`."""

CONSTANT = ("argmax", "ref_logp", "ref_lse")
"""Statistics without a gradient."""

FLOOR = -1e4
"""Log-probs below this count as this in entropies and divergences: its exp is 0 in float64 too, and 0 * FLOOR is 0, not nan."""


@dataclass(frozen=True)
class Head:
    """How N hidden states become logits over V items: cap(scale * (x W^T + sum_i x_i W_i^T + bias)) / temperature.

    Holds references only. Gradients flow to x, weight, bias and the extra terms, each in its own dtype. Products are taken
    in the dtype of x (a float32 weight under a bfloat16 x is rounded first, as autocast would), logits are float32 or better.
    """

    x: Tensor
    """[N, H] hidden states."""

    weight: Tensor
    """[V, H] the output embedding; a tied embedding is just that parameter."""

    extra: tuple[tuple[Tensor, Tensor], ...] = ()
    """(x_i [N, r], W_i [V, r]) further terms. LoRA on the head: x_i = scaling * dropout(x) @ A^T, W_i = B."""

    bias: Tensor | None = None
    """[V]; -inf removes an item."""

    scale: float = 1.0
    """Logit multiplier (Cohere, Granite)."""

    softcap: float | None = None
    """Logits become softcap * tanh(logits / softcap) (Gemma)."""

    temperature: float | Tensor = 1.0
    """Divides the capped logits: a number, or [N] one per token; no gradient flows to it."""

    vocab: int | None = None
    """Logical size of the vocabulary: rows of the weight beyond it are padding, are never read and get gradient 0."""

    @property
    def size(self) -> int:
        """Number of items the softmax runs over."""
        return self.weight.shape[0] if self.vocab is None else self.vocab

    @property
    def terms(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """All (x_i, W_i), the main one first."""
        return ((self.x, self.weight), *self.extra)

    @property
    def tensors(self) -> list[Tensor | None]:
        """Bias, temperature if it is one, x, weight, x_1, W_1, ...: what an autograd function is given."""
        temperature = self.temperature if isinstance(self.temperature, Tensor) else None
        return [self.bias, temperature, *(tensor for term in self.terms for tensor in term)]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the logits and of every statistic: float32, or float64 for float64 hidden states."""
        return torch.promote_types(self.x.dtype, torch.float32)


@dataclass(frozen=True)
class Form:
    """What of a head is not tensors; an autograd function keeps it beside the tensors that it saves."""

    scale: float
    softcap: float | None
    temperature: float
    vocab: int
    count: int
    """Number of tensors."""

    @classmethod
    def of(cls, head: Head) -> Form:
        """The form of a head."""
        temperature = 1.0 if isinstance(head.temperature, Tensor) else head.temperature
        return cls(head.scale, head.softcap, temperature, head.size, len(head.tensors))

    def head(self, tensors: Sequence[Tensor | None]) -> Head:
        """A head around these tensors, in the order of `Head.tensors`."""
        bias, temperature, x, weight, *extra = tensors
        terms = tuple(zip(extra[::2], extra[1::2], strict=True))
        temperature = self.temperature if temperature is None else temperature
        return Head(x, weight, terms, bias, self.scale, self.softcap, temperature, self.vocab)


@dataclass(frozen=True)
class Separable:
    """A statistic sum_v f(log policy(v), log reference(v)) over the common vocabulary.

    f is elementwise, in torch operations that autograd knows; it sees log-probs not below FLOOR, and no gradient flows to
    log-probs that are.
    """

    name: str
    """Key of the result."""

    f: Callable[[Tensor, Tensor], Tensor]
    """(lp, lq), equal shapes -> the term of the sum."""

    slope: Callable[[Tensor, Tensor], Tensor] | None = None
    """(lp, lq) -> derivative of f in lp, if it is worth writing down; else autograd takes it."""

    formula: tuple[str, float] | None = None
    """What `fused` calls the same function, with its parameter (formulas.py); where it knows none of this name, or None, f and
    slope are evaluated by torch there, too."""


@dataclass(frozen=True)
class Rowwise:
    """A statistic f(log policy, log reference, target) of the whole distributions of a token, where no sum over items will do.

    f gets the rows of a block of n tokens and gives one number each, in any torch operations; autograd takes its derivative
    in lp, so what should have none (a threshold, a sort) goes into `torch.no_grad()`. No gradient flows to anything else
    that f reads, nor to log-probs at FLOOR. f is evaluated again in the backward pass.
    """

    name: str
    """Key of the result."""

    f: Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
    """(lp [n, C], lq [n, C], target [n]) -> [n]. lp and lq are log-probs over the C items both heads have, not below FLOOR,
    float32 or better; without a ref lq is None and C is the head's own vocabulary. target is None where none was given, and
    may lie beyond C where the vocabularies differ."""

    temporaries: int = 16
    """How many [n, C] tensors f and its derivative hold at once at most (an int64 one counts twice); n follows from it."""

    also: tuple[str, ...] = ()
    """Names of further numbers of a token, without gradient, that f gives beside its value: (value [n], *others [n])."""

    def __call__(self, lp: Tensor, lq: Tensor | None, target: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """[n] values of f, and the further numbers by name.

        Raises:
            ValueError: f does not give one number a token, or not as many as `also` names.
        """
        values, *others = self.f(lp, lq, target) if self.also else (self.f(lp, lq, target),)
        for one in (values, *others):
            if one.shape != lp.shape[:1]:
                raise ValueError(f"want: {self.name!r} gave {list(one.shape)}, expected [{len(lp)}], a number for each token")
        return values, {name: one.detach() for name, one in zip(self.also, others, strict=True)}


KLS = {
    "forward_kl": Separable(
        "forward_kl", lambda lp, lq: lq.exp() * (lq - lp), lambda lp, lq: -lq.exp(), formula=("forward_kl", 0.0)
    ),
    "reverse_kl": Separable(
        "reverse_kl",
        lambda lp, lq: lp.exp() * (lp - lq),
        lambda lp, lq: lp.exp() * (lp - lq + 1),
        formula=("reverse_kl", 0.0),
    ),
}
"""The divergences that have a name of their own: KL(ref || policy) and KL(policy || ref)."""


Want = str | Separable | Rowwise


def name_of(entry: Want) -> str:
    """The key under which a wanted statistic is returned."""
    return entry if isinstance(entry, str) else entry.name


def names_of(want: Sequence[Want]) -> list[str]:
    """The keys under which wanted statistics are returned, those of `also` last."""
    return [name_of(entry) for entry in want] + [name for e in want if isinstance(e, Rowwise) for name in e.also]


def common(head: Head, ref: Head) -> int:
    """Size of the vocabulary two-head statistics run over: the first items that both heads have."""
    return min(head.size, ref.size)


def check(
    head: Head, want: Sequence[Want], target: Tensor | None, index: Tensor | None, ref: Head | None, eager: str | None
) -> None:
    """Refuse what cannot be computed.

    Raises:
        ValueError: an unknown or repeated name, a missing argument, or shapes that do not fit; says which.
    """
    names = names_of(want)
    if len(set(names)) < len(names):
        raise ValueError(f"want: names must differ, got {names}")
    possible = ", ".join(ONE_HEAD + TWO_HEADS)
    for entry in want:
        if isinstance(entry, str) and entry not in ONE_HEAD + TWO_HEADS:
            raise ValueError(f"want: no statistic {entry!r}; possible: {possible}, a Separable, a Rowwise")
        if (isinstance(entry, Separable) or entry in TWO_HEADS) and ref is None:
            raise ValueError(f"want: {name_of(entry)!r} needs ref, a second head")
        if entry in ("logp", "ref_logp") and target is None:
            raise ValueError(f"want: {entry!r} needs target [N]")
        if entry == "gather" and index is None:
            raise ValueError("want: 'gather' needs index [N, K]")
    if eager is not None and (eager not in names or eager in (*CONSTANT, "gather")):
        raise ValueError(f"eager: {eager!r} is not a wanted statistic with one gradient a token")
    n = head.x.shape[0]
    for role, one in (("head", head), ("ref", ref)):
        if one is not None:
            check_shapes(role, one, n)
    sizes = [one.size for one, name in ((head, "logp"), (ref, "ref_logp")) if one is not None and name in names]
    if target is not None:
        _check_ids("target", target, (n,), min(sizes, default=head.size))
    if index is not None:
        _check_ids("index", index, (n, index.shape[-1]), head.size)


def check_shapes(role: str, head: Head, n: int) -> None:
    """Refuse a head whose tensors do not fit N tokens and each other.

    Raises:
        ValueError: says which of `role`.
    """
    rows = head.weight.shape[0]
    for i, (x, weight) in enumerate(head.terms):
        if x.dim() != 2 or weight.dim() != 2 or x.shape[0] != n or weight.shape != (rows, x.shape[1]):
            where = f"{role}.extra[{i - 1}]" if i else role
            raise ValueError(f"{where}: x {list(x.shape)} and weight {list(weight.shape)} do not fit [{n}, H] and [{rows}, H]")
    if not 0 < head.size <= rows:
        raise ValueError(f"{role}.vocab: {head.size} is not within the {rows} rows of the weight")
    if head.bias is not None and head.bias.shape != (rows,):
        raise ValueError(f"{role}.bias: {list(head.bias.shape)}, expected [{rows}]")
    if isinstance(head.temperature, Tensor) and head.temperature.shape not in ((), (n,)):
        raise ValueError(f"{role}.temperature: {list(head.temperature.shape)}, expected a number or [{n}]")


def _check_ids(name: str, ids: Tensor, shape: tuple[int, ...], size: int) -> None:
    if ids.shape != shape or ids.dtype != torch.int64:
        raise ValueError(f"{name}: {list(ids.shape)} {ids.dtype}, expected int64 {list(shape)}")
    # Elsewhere than on the CPU this look at the values would stall the device; there an id outside yields nan.
    if ids.device.type == "cpu" and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise ValueError(f"{name}: ids from {int(ids.min())} to {int(ids.max())}, outside the vocabulary of {size}")
