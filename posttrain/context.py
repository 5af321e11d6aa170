"""What an objective reads beside its own rows: progress, global means of the step taken before any loss, running means.

See `Pairs.context` in stats.py for what is in it, and `objective(before=...)` and `Loss.remember` for who puts it there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

PREFIX = "context."
"""Keys of the context in a batch."""


class Context(TrainerCallback, ExportableState):
    """Keeps the running means; they are part of every checkpoint.

    Args:
        sums: name -> (sum, count) over all steps so far.
    """

    def __init__(self, sums: Mapping[str, Sequence[float]] | None = None) -> None:
        self.sums = {name: list(pair) for name, pair in (sums or {}).items()}
        self.accelerator: Any = None
        self._pending: dict[str, Tensor] = {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {"sums": self.sums}, "attributes": {}}

    def remember(self, values: Mapping[str, Tensor]) -> None:
        """Add a micro-batch's values to those of its step."""
        for name, tensor in values.items():
            tensor = tensor.detach().double()
            self._pending[name] = self._pending.get(name, 0) + torch.stack([tensor.sum(), tensor.new_tensor(tensor.numel())])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the finished step into the running means, over all processes alike."""
        for name in sorted(self._pending):
            total, count = self.accelerator.reduce(self._pending[name], "sum").tolist()
            before = self.sums.get(name, [0.0, 0.0])
            self.sums[name] = [before[0] + total, before[1] + count]
        self._pending = {}

    def scalars(self, state: Any) -> dict[str, Tensor]:
        """Progress and running means now."""
        progress = state.global_step / state.max_steps if state.max_steps > 0 else 0.0
        means = {name: total / max(count, 1) for name, (total, count) in self.sums.items()}
        return {name: torch.tensor(value, dtype=torch.float32) for name, value in {"progress": progress, **means}.items()}


def read(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The context that a batch carries."""
    return {name.removeprefix(PREFIX): value for name, value in batch.items() if name.startswith(PREFIX)}
