"""What an objective reads beside its own rows: progress, global means of the step taken before any loss, running means.

See `Pairs.context` in stats.py for what is in it, and `objective(before=...)` and `Loss.remember` for who puts it there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

PREFIX = "context."
"""Keys of the context in a batch."""

_SUMS = "posttrain.context"
"""Where the trainer's state, which every checkpoint holds, has the sum and the count of each running mean."""


class Context(TrainerCallback):
    """Keeps the running means, in the trainer's state and so in every checkpoint."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self._pending: dict[str, Tensor] = {}

    def remember(self, values: Mapping[str, Tensor]) -> None:
        """Add a micro-batch's values to those of its step."""
        for name, tensor in values.items():
            tensor = tensor.detach().double()
            self._pending[name] = self._pending.get(name, 0) + torch.stack([tensor.sum(), tensor.new_tensor(tensor.numel())])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the finished step into the running means, over all processes alike."""
        sums = state.stateful_callbacks.setdefault(_SUMS, {})
        for name in sorted(self._pending):
            total, count = self.accelerator.reduce(self._pending[name], "sum").tolist()
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + total, before[1] + count)
        self._pending = {}


def scalars(state: Any) -> dict[str, Tensor]:
    """Progress and running means now, from the trainer's state."""
    progress = state.global_step / state.max_steps if state.max_steps > 0 else 0.0
    sums = state.stateful_callbacks.get(_SUMS, {})
    means = {name: total / max(count, 1) for name, (total, count) in sums.items()}
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in {"progress": progress, **means}.items()}


def read(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The context that a batch carries."""
    return {name.removeprefix(PREFIX): value for name, value in batch.items() if name.startswith(PREFIX)}
