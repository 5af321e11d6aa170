"""What a model with one output says of completions: the statistics of reward models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One number for each of B completions, read after its prompt through its last token."""

    values: torch.Tensor
    """[B] the scores, with gradient, in float32 or better."""

    lengths: torch.Tensor
    """[B] number of tokens of each completion."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """B prompts with a chosen and a rejected completion each, scored by the model in training: the family of reward models."""

    chosen: Scores
    """The preferred completion of each pair."""

    rejected: Scores
    """The other completion of each pair."""

    margin: torch.Tensor = field(metadata={"absent": 0.0})
    """[B] by how much the chosen score ought to be the larger, where the data say so."""

    context: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """As in `Pairs`."""
