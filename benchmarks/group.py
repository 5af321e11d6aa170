"""A policy gradient on given completions of a prompt, with given advantages: what a GRPO step computes after sampling.

    loss_t = - advantage * policy(y_t) / sg policy(y_t),   mean over all completion tokens

Value at policy == reference: minus the mean advantage of a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from posttrain.registry import objective
from posttrain.stats import Completions, Loss

NAME = "given_group"


@dataclass(frozen=True, kw_only=True)
class Group:
    """B prompts with G completions each."""

    completion: Completions
    """The completions, those of a prompt one after the other."""

    advantage: torch.Tensor
    """[B, G]"""

    context: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """As in `posttrain.stats.Pairs`."""


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """No settings."""


@objective(reference=False)
def given_group(config: GroupConfig, group: Group) -> Loss:
    one = group.completion
    ratio = (one.logps - one.logps.detach()).exp()  # 1, with the gradient of the log-prob
    return Loss(-one.spread(group.advantage.flatten()) * ratio, {}, "completion")
