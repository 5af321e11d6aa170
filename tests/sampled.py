"""A small online objective for tests of the trainer: REINFORCE with the group's mean as baseline and a clipped ratio."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from posttrain.experience import Experience, Lesson, Sampled, token_columns_of
from posttrain.registry import objective
from posttrain.stats import Loss


@dataclass(frozen=True, kw_only=True)
class SampledConfig:
    """Settings of the objective."""

    beta: float = 0.0
    """Weight of log(policy / reference) in the reward; the reference is read where it is not 0."""

    drop: float | None = None
    """Leave out completions whose score is below this."""


def lesson(config: SampledConfig, seen: Experience) -> Lesson:
    """The score, less what it costs to leave the reference, less the mean of the group."""
    reward = seen.scores
    if config.beta:
        reward = reward - config.beta * seen.completion.logratio
    groups = reward.view(-1, seen.group)
    advantages = seen.completion.spread((groups - groups.mean(1, keepdim=True)).flatten())
    tokens = dict.fromkeys(token_columns_of(Sampled), torch.zeros_like(advantages))
    tokens |= {"advantages": advantages, "old_logps": seen.old_logps, "weights": torch.ones_like(advantages)}
    keep = torch.ones_like(seen.finished) if config.drop is None else seen.scores >= config.drop
    count = seen.total(torch.tensor([float(len(reward))], device=reward.device))
    return Lesson(keep=keep, tokens=tokens, metrics={"lesson/all": count}, remember={"mean_score": seen.scores})


@objective(reference=lambda config: config.beta != 0, lesson=lesson)
def sampled(config: SampledConfig, seen: Sampled) -> Loss:
    """The loss of each token."""
    ratio = (seen.completion.logps - seen.old_logps).exp()
    clipped = ratio.clamp(0.8, 1.2)
    values = -torch.minimum(ratio * seen.advantages, clipped * seen.advantages) * seen.weights
    metrics = {"ratio/max": (ratio.detach() - 1).abs()}
    metrics |= {"seen/mean_score": seen.context["mean_score"].reshape(1)} if "mean_score" in seen.context else {}
    return Loss(values, metrics, per="completion")


FAILS_AT: int | None = None
"""A call of `spread` after so many others raises; for tests of what is left behind."""

_CALLS = 0


def spread(prompts, completions, rows):
    """A scorer: the number of different characters, and the row's own bonus."""
    if FAILS_AT is not None and len(rows) > 1:
        globals()["_CALLS"] += 1
    if FAILS_AT is not None and FAILS_AT <= _CALLS:
        raise ValueError("out of order")
    return [len(set(text)) + row["bonus"] for text, row in zip(completions, rows, strict=True)]
