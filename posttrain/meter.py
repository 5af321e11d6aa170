"""Means of metrics over rows, micro-batches and processes, and the rates of a run."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_QUANTILE = re.compile(r"/p(\d\d)$")


class Meter:
    """Metrics since the last `clear`; a name ends in how it is reduced (`Loss.metrics` lists the endings), else by the mean."""

    def __init__(self) -> None:
        self._names: dict[str, None] = {}
        self._sums: dict[str, Tensor] = {}
        self._extremes: dict[str, Tensor] = {}
        self._values: dict[str, list[Tensor]] = {}
        self._tokens = torch.zeros(())
        self._since = time.perf_counter()

    def clear(self) -> None:
        """Start anew."""
        self.__init__()

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add tensors of any length, one element an observation."""
        self._names |= dict.fromkeys(metrics)
        for name, values in metrics.items():
            values = values.detach().double().flatten()
            if name.endswith(("/max", "/min")):
                sign = 1 if name.endswith("/max") else -1
                worst = torch.full((1,), -torch.inf, dtype=torch.float64, device=values.device)
                new = torch.cat([values * sign, worst]).max().reshape(1)
                self._extremes[name] = torch.maximum(self._extremes.get(name, new), new)
            elif _QUANTILE.search(name):
                self._values.setdefault(name, []).append(values)
            else:
                new = torch.stack([values.sum(), values.square().sum(), values.new_tensor(values.numel())])
                self._sums[name] = self._sums.get(name, 0) + new

    def tokens(self, batch: Mapping[str, Tensor]) -> None:
        """Count the tokens (padding left out) that a batch took through the model."""
        self._tokens = self._tokens.to(batch["tree"].device) + (batch["tree"] > 0).sum()

    def reduce(self, accelerator: Any) -> dict[str, float]:
        """The metrics over all processes; nothing of what none of them saw. Every process calls it, with the same names."""
        out = {}
        if self._sums:
            reduced = accelerator.reduce(torch.stack([self._sums[name] for name in sorted(self._sums)]), "sum").tolist()
            for name, (total, squares, count) in zip(sorted(self._sums), reduced, strict=True):
                if name.endswith("/ess"):
                    out |= {name: total**2 / (squares * count)} if squares else {}
                elif name.endswith("/std"):
                    out |= {name: max(squares / count - (total / count) ** 2, 0.0) ** 0.5} if count else {}
                elif count:
                    out[name] = total if name.endswith("/sum") else total / count
        if self._extremes:
            names = sorted(self._extremes)
            gathered = accelerator.gather(torch.stack([self._extremes[name] for name in names], 1))  # [ranks, k]
            for name, value in zip(names, gathered.max(0).values.tolist(), strict=True):
                if value != -np.inf:
                    out[name] = value if name.endswith("/max") else -value
        for name in sorted(self._values):
            padded = accelerator.pad_across_processes(torch.cat(self._values[name]), pad_index=torch.nan)
            seen = accelerator.gather(padded)
            seen = seen[~seen.isnan()].cpu().numpy()
            if len(seen):
                out[name] = float(np.quantile(seen, int(_QUANTILE.search(name)[1]) / 100))
        return {name: out[name] for name in self._names if name in out}

    def rates(self, accelerator: Any) -> dict[str, float]:
        """`tokens_per_second` over all processes since the last clear, and `memory_gib`, the largest peak of a process."""
        tokens = accelerator.reduce(self._tokens.double().reshape(1).to(accelerator.device), "sum")
        memory = accelerator.gather(torch.tensor([peak_memory()], dtype=torch.float64, device=accelerator.device))
        seconds = max(time.perf_counter() - self._since, 1e-9)
        return {"tokens_per_second": float(tokens) / seconds, "memory_gib": float(memory.max()) / 2**30}


def peak_memory() -> int:
    """Bytes this process has held at most: allocated on its GPU, or resident where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
