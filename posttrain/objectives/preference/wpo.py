"""WPO: any loss of pairs, each pair weighted by how likely the policy is to write its two completions itself.

    loss = w * L(chosen, rejected),   w = w(chosen) * w(rejected), without gradient
    w(y) = exp(mean over t of log policy(y_t) - A_t)
    A_t = log sum_v policy(v)^2 (sampled),   log max_v policy(v) (greedy),   0 (none)

So pairs of other models count as if the policy had sampled them. The alignment A_t takes out how sure the policy is: sampled is
the log of the mean probability of a token it samples, so that its own samples weigh somewhat less than 1 whether it is sure or
not. The mean of the loss is over pairs, not over weights: where all pairs are unlikely, the loss is small.

L is any loss of pairs that is a function of one pair's log-probs, with or without a reference. Refused are those that rank the
pairs of a batch (aot), read columns of the data (mmpo, sppo_soft) or divergences over the vocabulary (tdpo). A term of L over
tokens, such as an NLL, is weighted like the rest. Rewards logged: those of L.

The authors' code clamps w at 1 (the product, not each factor), of which the paper says nothing: `clamp`. TRL clamped from 0.12
to 0.28 and no longer does. Both take probabilities in the dtype of the logits, where the squares of a flat row can vanish; here
log sum p^2 is a logarithm throughout. `wpo/above_one` is the share of pairs that the clamp cuts, or would cut.

Source: Zhou et al. 2024, "WPO: Enhancing RLHF with Weighted Preference Optimization", arXiv:2406.11827, eq. 1 and 2; sides: its
ablation.
Value at policy == reference: the value of L times w, which depends on the data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch

from ...nested import Nested
from ...registry import Objective, objective
from ...stats import Completions, Loss, Pairs, Want

Alignment = Literal["sampled", "greedy", "none"]

ALIGNMENTS: Mapping[Alignment, str | None] = {"sampled": "log_sum_p2", "greedy": "max_logp", "none": None}
"""Alignment -> the statistic that is A_t."""


def _admits(one: Objective) -> bool:
    """A loss of the log-probs of one pair; entropies are only logged."""
    alone = one.family is Pairs and one.before is None and one.state is None and not one.coupled
    return alone and one.name != "wpo" and all(want == "entropy" for want in one.want(one.config()))


LOSS = Nested("a loss of the log-probs of one pair", _admits, {"name": "dpo", "beta": 0.01})


@dataclass(frozen=True, kw_only=True)
class WPOConfig:
    """Settings of WPO."""

    loss: Annotated[dict[str, Any], LOSS] = field(default_factory=lambda: LOSS.complete({}))
    """The loss that is weighted; without a name dpo, whose beta is then the paper's 0.01."""

    alignment: Alignment = "sampled"
    """What the log-prob of each token is compared with: that of a token the policy samples, of its likeliest, or nothing."""

    clamp: bool = False
    """No weight above 1, as in the authors' code."""

    side: Literal["both", "chosen", "rejected"] = "both"
    """Whose weight counts."""


def wanted(alignment: Alignment) -> list[str]:
    """The statistics that an alignment needs."""
    return [statistic for statistic in [ALIGNMENTS[alignment]] if statistic is not None]


def log_weight(one: Completions, alignment: Alignment) -> torch.Tensor:
    """[B] log w(y) of each completion, without gradient."""
    shift = sum(one.mean(one[statistic].detach()) for statistic in wanted(alignment))
    return one.mean(one.logps.detach()) - shift


def _want(config: WPOConfig) -> Sequence[Want]:
    inner, settings = LOSS.find(config.loss)
    return [*inner.want(settings), *wanted(config.alignment)]


def _reads_reference(config: WPOConfig) -> bool:
    inner, settings = LOSS.find(config.loss)
    return inner.reads_reference(settings)


@objective(reference=_reads_reference, want=_want)
def wpo(config: WPOConfig, pairs: Pairs) -> Loss:
    inner, settings = LOSS.find(config.loss)
    sides = {role: log_weight(vars(pairs)[role], config.alignment) for role in ("chosen", "rejected")}  # [B]
    log_w = sum(value for role, value in sides.items() if config.side in ("both", role))  # [B]
    w = (log_w.clamp(max=0) if config.clamp else log_w).exp()
    loss = _weighted(inner(settings, pairs), w, pairs)
    metrics = {
        **loss.metrics,
        **weight_metrics(w),
        "wpo/above_one": (log_w > 0).to(w.dtype),
        **{f"wpo/log_weight/{role}": value for role, value in sides.items()},
        **{f"wpo/{name}": torch.cat([pairs.chosen[name], pairs.rejected[name]]).detach() for name in wanted(config.alignment)},
    }
    return dataclasses.replace(loss, metrics=metrics)


def _weighted(loss: Loss, w: torch.Tensor, pairs: Pairs) -> Loss:
    """Every term of a loss times the weight [B] of its pair."""
    weight = w if loss.per == "row" else vars(pairs)[loss.per].spread(w)
    plus = None if loss.plus is None else _weighted(loss.plus, w, pairs)
    return dataclasses.replace(loss, values=loss.values * weight, plus=plus)


def weight_metrics(w: torch.Tensor) -> dict[str, torch.Tensor]:
    """Weights [B] as they stand in the loss: mean, quantiles, largest, and the share of them that is effective."""
    return {f"wpo/weight{ending}": w for ending in ("", "/p10", "/p50", "/p90", "/max", "/ess")}
