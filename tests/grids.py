"""Golden files of policy optimisation: [B, T] numbers with a mask, as the flat statistics that the toolkit has."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from posttrain.stats import Completions

_FOLDER = Path(__file__).parent / "goldens"


def read(name: str) -> dict[str, Any]:
    """The golden file `name`."""
    return json.loads((_FOLDER / f"{name}.json").read_text())


def tensor(values: Any) -> torch.Tensor:
    """Nested numbers -> float64."""
    return torch.tensor(values, dtype=torch.float64)


class Grid:
    """The tokens of a [B, T] mask, laid end to end."""

    def __init__(self, mask: Any) -> None:
        self.mask = tensor(mask) > 0.5
        assert (self.mask.sum(1) == self.mask.cumprod(1).sum(1)).all(), "padding stands on the right"

    @property
    def lengths(self) -> torch.Tensor:
        """[B] tokens of each completion."""
        return self.mask.sum(1)

    def flat(self, values: Any) -> torch.Tensor:
        """[B, T] -> [N]."""
        return (values if isinstance(values, torch.Tensor) else tensor(values))[self.mask]

    def completions(self, logps: torch.Tensor, reference_logps: torch.Tensor | None = None) -> Completions:
        """[B, T] log-probs -> completions."""
        reference = None if reference_logps is None else self.flat(reference_logps)
        return Completions(logps=self.flat(logps), lengths=self.lengths, reference_logps=reference)


def same(got: torch.Tensor, expected: Any, atol: float = 1e-9) -> None:
    """Assert equality to `atol`, no relative part."""
    torch.testing.assert_close(got.detach().double(), tensor(expected), rtol=0, atol=atol)


def together(count: int, work: Callable[[int, Callable[[torch.Tensor], torch.Tensor]], Any]) -> list[Any]:
    """What `work(rank, total)` gives in each of `count` processes (threads here) whose `total` is the sum over all of them."""
    barrier, slots = threading.Barrier(count, timeout=20), [torch.empty(0)] * count

    def total_of(rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def total(values: torch.Tensor) -> torch.Tensor:
            slots[rank] = values
            barrier.wait()
            whole = sum(slots[1:], slots[0])
            barrier.wait()
            return whole

        return total

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda rank: work(rank, total_of(rank)), range(count)))
