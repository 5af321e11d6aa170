"""SuperHF: sample, keep the best by the reward, and fine-tune on it, held to the reference.

    loss = -log policy(y_t) + beta KL(reference || policy) at t,   mean over all tokens of the completions kept

Of each prompt's group of completions the best `keep` are learned from, for one supervised pass; completions without tokens are
dropped, as in the authors' code, which cuts where another speaker begins (`sampling.stop`). The KL is over the whole
vocabulary, from the reference to the policy, so it keeps what the reference would say possible; the cross-entropy moves the
policy to the best of its own samples.

The authors' code sums the KL over the examples of a minibatch, each with the mean over its positions, so that its weight grows
with the minibatch: `kl_reduction: examples` with `minibatch` is that. It also masks the KL one position off, takes paddings for
labels (with padding on the left prompts, too), and clamps an example's KL at 0; none of this is done here.

Source: Mukobi et al. 2023, "SuperHF: Supervised Iterative Learning from Human Feedback", arXiv:2310.16763, and its code, which
decides the direction of the KL.
Value at policy == reference: the mean negative log-likelihood of the kept completions, which depends on the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ...divergences import divergence
from ...experience import Experience, Kept, Lesson
from ...registry import objective
from ...schema import NonNegative, PositiveInt, UserError
from ...stats import Loss, Sum, Want, wide


@dataclass(frozen=True, kw_only=True)
class SuperHFConfig:
    """Settings of SuperHF."""

    beta: NonNegative = 0.35
    """Weight of the KL; 0 reads no reference, and collapses onto a few completions sooner or later."""

    keep: PositiveInt = 1
    """Completions of each group to learn from, the best."""

    kl_reduction: Literal["tokens", "examples"] = "tokens"
    """Mean over all tokens, or, as released, the sum over the examples of a minibatch, each with the mean over its tokens."""

    minibatch: PositiveInt = 1
    """Examples that `kl_reduction: examples` sums over."""

    def __post_init__(self) -> None:
        if self.kl_reduction == "tokens" and self.minibatch != 1:
            raise ValueError("minibatch is for kl_reduction = examples and would be ignored; leave it out")


def _want(config: SuperHFConfig) -> Sequence[Want]:
    if not config.beta:
        return ()
    entry = divergence("forward_kl")
    eager = config.kl_reduction == "tokens"
    return (Sum(name="forward_kl", summand=entry.summand, slope=entry.slope, divergence="forward_kl", eager=eager),)


def _lesson(config: SuperHFConfig, seen: Experience) -> Lesson:
    group = seen.group
    if group <= config.keep:
        raise UserError(
            f"rollouts.group_size = {group}: of a group the best {config.keep} are kept; it has to be larger than that"
        )
    rows = wide(seen.scores).view(len(seen.scores) // group, group)
    there = (seen.lengths > 0).view_as(rows)
    best = rows.masked_fill(~there, -torch.inf).sort(dim=1, descending=True, stable=True).indices[:, : config.keep]
    keep = (torch.zeros_like(there).scatter(1, best, True) & there).flatten()
    return Lesson(keep=keep, metrics={"reward/kept": rows.flatten()[keep]})


@objective(reference=lambda config: config.beta > 0, want=_want, lesson=_lesson)
def superhf(config: SuperHFConfig, kept: Kept) -> Loss:
    one = kept.completion
    nll = -wide(one.logps)  # [N]
    metrics = {"nll": nll.detach()}
    if not config.beta:
        return Loss(nll, metrics, "completion")
    kl = wide(one["forward_kl"])  # [N]
    metrics["kl/forward"] = kl.detach()
    if config.kl_reduction == "tokens":
        return Loss(nll + config.beta * kl, metrics, "completion")
    return Loss(nll, metrics, "completion", Loss(config.beta * config.minibatch * one.mean(kl)))
