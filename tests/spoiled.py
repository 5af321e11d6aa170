"""An objective that goes wrong on purpose, for `imports: [spoiled]`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch

from posttrain.registry import objective
from posttrain.stats import Loss, Pairs


@dataclass(frozen=True, kw_only=True)
class SpoiledConfig:
    """What goes wrong, and when."""

    what: Literal["loss", "gradient"] = "loss"
    """The loss is not a number, or only its gradient is not."""

    at: float = 0.5
    """Progress at which it does."""

    rank: int = 0
    """Process on which it does."""


@objective(reference=True)
def spoiled(config: SpoiledConfig, pairs: Pairs) -> Loss:
    """-log sigmoid of the margin, but for one step of one process."""
    values = -torch.nn.functional.logsigmoid(pairs.chosen.logratio - pairs.rejected.logratio)
    if abs(pairs.context["progress"].item() - config.at) < 1e-6 and int(os.environ.get("RANK", "0")) == config.rank:
        values = values * torch.nan if config.what == "loss" else values + (values * 0).sqrt()
    return Loss(values)
