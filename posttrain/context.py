"""What an objective reads beside its own rows: progress, global means of the step taken before any loss, running means, state.

See `Pairs.context` in stats.py for what is in it, and `objective(before=..., state=...)` and `Loss.remember` for who puts it
there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

PREFIX = "context."
"""Keys of the context in a batch."""

_SUMS = "posttrain.context"
"""Where the trainer's state, which every checkpoint holds, has the sum and the count of each running mean."""

_STATE = "posttrain.state"
"""Where it has the objective's state."""

After = Callable[[Mapping[str, float], Mapping[str, float]], Mapping[str, float]]
"""(context, means of the step) -> state; see `Objective.state`."""


class Context(TrainerCallback):
    """Keeps the running means and the objective's state, in the trainer's state and so in every checkpoint.

    Args:
        accelerator: reduces over processes.
        after: the objective's state under its settings, if it has one.
    """

    def __init__(self, accelerator: Any, after: After | None = None) -> None:
        self.accelerator, self.after = accelerator, after
        self._pending: dict[str, Tensor] = {}
        self._skipped = False

    def skip(self) -> None:
        """Take nothing of this step."""
        self._pending, self._skipped = {}, True

    def remember(self, values: Mapping[str, Tensor]) -> None:
        """Add a micro-batch's values to those of its step."""
        for name, tensor in values.items():
            tensor = tensor.detach().double()
            self._pending[name] = self._pending.get(name, 0) + torch.stack([tensor.sum(), tensor.new_tensor(tensor.numel())])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the finished step into the running means and the state, over all processes alike."""
        if self._skipped:
            self._skipped = False
            return
        sums, means = state.stateful_callbacks.setdefault(_SUMS, {}), {}
        for name in sorted(self._pending):
            total, count = self.accelerator.reduce(self._pending[name], "sum").tolist()
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + total, before[1] + count)
            means[name] = total / max(count, 1)
        self._pending = {}
        if self.after is not None:
            state.stateful_callbacks[_STATE] = dict(self.after(self._numbers(state), means))

    def scalars(self, state: Any) -> dict[str, Tensor]:
        """Progress, running means and the objective's state now, from the trainer's state."""
        return {name: torch.tensor(value, dtype=torch.float32) for name, value in self._numbers(state).items()}

    def _numbers(self, state: Any) -> dict[str, float]:
        kept = state.stateful_callbacks
        progress = state.global_step / state.max_steps if state.max_steps > 0 else 0.0
        means = {name: total / max(count, 1) for name, (total, count) in kept.get(_SUMS, {}).items()}
        if self.after is not None and _STATE not in kept:
            return {"progress": progress, **means, **self.after({}, {})}
        return {"progress": progress, **means, **kept.get(_STATE, {})}


def read(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The context that a batch carries."""
    return {name.removeprefix(PREFIX): value for name, value in batch.items() if name.startswith(PREFIX)}
