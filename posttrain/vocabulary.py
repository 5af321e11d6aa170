"""What output heads say of each token: the wants of an objective as calls of the vocabulary kernel."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import posttrain_kernels as kernels
import torch
from posttrain_kernels import Head
from torch import Tensor

from .costs import costs, spans
from .divergences import divergence
from .stats import Costs, Ranked, Rowwise, Spans, Sum, Top, Want

KERNEL_STATISTICS = (*kernels.ONE_HEAD, *kernels.TWO_HEADS)
"""What the kernel computes by name; any other name is a divergence of divergences.py."""

DROPPED = "dropped/"
"""Begins the names of the shares of probability that two models put on what only one of them has."""

_APART = (Ranked, Costs, Spans)
"""Statistics with a pass over the vocabulary of their own."""


def statistics(
    head: Head,
    want: Sequence[Want],
    *,
    targets: Tensor,
    ref: Head | None = None,
    index: Tensor | None = None,
    impl: str = "auto",
) -> dict[str, Tensor]:
    """The wanted statistics of N tokens by name; see `Want` for names and shapes.

    Args:
        head: of the policy, on the hidden states of the tokens; gradients flow to it.
        targets: [N] the tokens.
        ref: the head of the reference on the same tokens.
        index: [N, K] the items of a `Top`, without `ref`.
        impl: implementation of the kernel.
    """
    out: dict[str, Tensor] = {}
    for entry in want:
        if isinstance(entry, _APART):
            out |= _apart(entry, head, targets, ref, impl)
    cut = "ref_logp" in want and ref.vocab is not None and (len(ref.weight) > ref.vocab or head.size > ref.vocab)
    more = [name for name in ("lse", "ref_lse") if cut and name not in want]
    want = [entry for entry in (*want, *more) if not isinstance(entry, _APART)]
    for temperature in sorted({_temperature(entry) for entry in want}):
        part = [entry for entry in want if _temperature(entry) == temperature]
        out |= _at(_cooled(head, temperature), part, targets, ref and _cooled(ref, temperature), index, impl)
    if cut:
        out |= _dropped(head, ref, out["lse"], out["ref_lse"], impl)
    return {name: values for name, values in out.items() if name not in more}


def _dropped(head: Head, ref: Head, lse: Tensor, ref_lse: Tensor, impl: str) -> dict[str, Tensor]:
    """[N] each: the probability that student and teacher put on rows of their heads beyond the teacher's vocabulary.

    Args:
        lse: [N] log sum exp of all of the student's logits.
        ref_lse: [N] the same of the teacher's within its vocabulary.
    """
    with torch.no_grad():
        whole = dataclasses.replace(ref, vocab=None)
        return {
            f"{DROPPED}student": (_beyond(head, ref.size, impl) - lse).exp(),
            f"{DROPPED}teacher": (_beyond(whole, ref.size, impl) - ref_lse).sigmoid(),
        }


def _beyond(head: Head, first: int, impl: str) -> Tensor:
    """[N] log sum exp of the logits of the items from `first` on; -inf where a head has none."""
    if head.size <= first:
        return torch.full((len(head.x),), -math.inf, dtype=head.dtype, device=head.x.device)
    rest = slice(first, head.size)
    part = dataclasses.replace(
        head,
        weight=head.weight[rest],
        extra=tuple((x, weight[rest]) for x, weight in head.extra),
        bias=None if head.bias is None else head.bias[rest],
        vocab=None,
    )
    return kernels.head_stats(part, ["lse"], impl=impl)["lse"]


@torch.no_grad()
def likeliest(head: Head, targets: Tensor, top: Top) -> dict[str, Tensor]:
    """What is kept of a teacher by its head: `ids` and `logps` [N, k] as `statistics` gives them for `top`, and `own` [N], the
    log-probs of the tokens."""
    ids, logps = kernels.top_k(_cooled(head, top.temperature), min(top.k, head.size))
    return {"ids": ids, "logps": logps, "own": kernels.head_stats(head, ["logp"], target=targets)["logp"]}


def mean_logits(head: Head) -> Tensor:
    """[N] the mean over the vocabulary of a head's logits before scale and soft-cap, by the mean of the rows of its weight."""
    dtype = torch.promote_types(head.weight.dtype, torch.float32)
    mean = head.x.to(dtype) @ head.weight[: head.size].mean(0, dtype=dtype)
    return mean if head.bias is None else mean + head.bias[: head.size].mean(dtype=dtype)


def _apart(want: Ranked | Costs | Spans, head: Head, targets: Tensor, ref: Head, impl: str) -> dict[str, Tensor]:
    head, ref = _cooled(head, want.temperature), _cooled(ref, want.temperature)
    match want:
        case Costs():
            return costs(head, ref, targets, want)
        case Spans():
            return spans(head, ref)
    ids, _ = kernels.top_k(head, min(want.k, head.size))
    logps = kernels.head_stats(head, ["gather"], index=ids, impl=impl)["gather"]
    return {"ranked_logps": logps, "ranked_reference_logps": kernels.top_k(ref, min(want.k, ref.size))[1]}


def _at(
    head: Head, want: Sequence[Want], targets: Tensor, ref: Head | None, index: Tensor | None, impl: str
) -> dict[str, Tensor]:
    tops = [entry for entry in want if isinstance(entry, Top)]
    entries = [_entry(one) for one in want if not isinstance(one, Top)]
    eager = next((one.name for one in want if isinstance(one, Sum | Rowwise) and one.eager), None)
    if not tops:
        return kernels.head_stats(head, entries, target=targets, ref=ref, impl=impl, eager=eager)
    found: dict[str, Tensor] = {}
    if ref is not None:
        (top,) = tops
        index, found["top_reference_logps"] = kernels.top_k(ref, min(top.k, ref.size, head.size))
    out = kernels.head_stats(head, [*entries, "gather"], target=targets, index=index, ref=ref, impl=impl, eager=eager)
    return {**out, **found, "top_ids": index, "top_logps": out.pop("gather")}


def _entry(want: Want) -> kernels.Want:
    match want:
        case Sum():
            return kernels.Separable(want.name, want.summand, want.slope, _formula(want.divergence))
        case Rowwise():
            return kernels.Rowwise(want.name, want.f, also=want.also)
    if want in KERNEL_STATISTICS:
        return want
    entry = divergence(want)
    return kernels.Separable(want, entry.summand, entry.slope, _formula(want))


def _formula(name: str | None) -> tuple[str, float] | None:
    """How the kernel calls a divergence: its name apart from its parameter."""
    if name is None:
        return None
    family, _, parameter = name.partition(":")
    return family, float(parameter or 0)


def _temperature(want: Want) -> float:
    return 1.0 if isinstance(want, str) else want.temperature


def _cooled(head: Head, temperature: float) -> Head:
    return head if temperature == 1 else dataclasses.replace(head, temperature=head.temperature * temperature)
