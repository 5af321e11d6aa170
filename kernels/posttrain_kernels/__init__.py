"""Statistics of softmax heads over large vocabularies, per token, without a [tokens, vocabulary] tensor.

`head_stats` returns log-probs, entropies, divergences between two models and more, each with its gradient. It returns
statistics, never losses: a loss is ordinary torch on the [N] tensors it gives. `top_k` finds the likeliest items,
`l1_cost` and `span_cost` compare the distributions of several tokens of two models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from .choose import implementation, why_not_fused
from .chunked import chunked_stats
from .costs import l1_cost, span_cost
from .dense import dense_stats
from .head import FLOOR, KLS, ONE_HEAD, TWO_HEADS, Head, Rowwise, Separable, Want, check
from .kept import TORCH
from .top import top_k

__all__ = [
    "FLOOR",
    "KLS",
    "ONE_HEAD",
    "TWO_HEADS",
    "Head",
    "Rowwise",
    "Separable",
    "head_stats",
    "l1_cost",
    "span_cost",
    "top_k",
    "why_not_fused",
]


def head_stats(
    head: Head,
    want: Sequence[Want],
    *,
    target: Tensor | None = None,
    index: Tensor | None = None,
    ref: Head | None = None,
    workspace: int | None = None,
    impl: Literal["auto", "dense", "chunked", "fused"] = "auto",
    eager: str | None = None,
    keep: int = 0,
) -> dict[str, Tensor]:
    """Statistics of softmax(logits of `head`), per token.

    Args:
        head: the policy; gradients flow to its tensors.
        want: what to compute. Of the policy alone: `logp` (at target), `lse` (log sum exp of the logits), `entropy`,
            `log_sum_p2` (log sum_v p_v^2), `max_logp`, `argmax` (int64), `gather` (log-probs at index). With `ref`:
            `ref_logp` (at target), `ref_lse`, `forward_kl` = KL(ref || policy), `reverse_kl` = KL(policy || ref), any
            `Separable`. With or without `ref`: any `Rowwise`. Statistics of two heads run over the vocabulary that both have,
            each renormalised there (`ref_logp` and `ref_lse` excepted); the others over the head's own.
        target: [N] int64 ids.
        index: [N, K] int64 ids.
        ref: the second head (reference, teacher): any hidden size, no gradient.
        workspace: bytes of temporary memory to aim at; never grows with N.
        impl: `chunked`; `fused`, the same loops with Triton's passes over the tiles; `dense` (the definition: materialises
            [N, V]); or `auto`: what the environment variable POSTTRAIN_KERNEL says, without it `fused` on NVIDIA GPUs where it
            can run (`why_not_fused`), else `chunked`. A `Rowwise`, and a `Separable` without a formula, are evaluated by torch
            under `fused`, too.
        eager: name of the one wanted statistic whose upstream gradient will be the same number for every token, as under a
            mean over tokens. Its gradients are then taken in the forward, which saves a product with each head, at the price of
            holding dW from the forward on. If the numbers differ after all, the gradient is still exact and nothing is saved.
        keep: bytes of logits that may be held from the forward to the backward of a trained head, so that they need not be
            computed again there. For statistics of one head; the gradient has the same bits.

    Returns:
        By name, [N] (gather: [N, K]) float32 tensors, float64 for float64 inputs; all differentiable but argmax, ref_logp,
        ref_lse and what a Rowwise gives beside its value.

    Raises:
        ValueError: an unknown name, a missing argument, shapes that do not fit, ids outside the vocabulary; no such
            implementation, or `fused` where it cannot run, with the reason.
    """
    check(head, want, target, index, ref, eager)
    chosen, passes = implementation(impl, head, ref), TORCH
    if chosen == "dense":
        return dense_stats(head, want, target=target, index=index, ref=ref)
    if chosen == "fused":
        from .fused import passes_for  # here, as it imports triton

        passes = passes_for(want)
    arguments = {"target": target, "index": index, "ref": ref, "workspace": workspace, "eager": eager, "keep": keep}
    return chunked_stats(head, want, **arguments, passes=passes)
