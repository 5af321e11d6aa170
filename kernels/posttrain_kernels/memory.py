"""When memory runs out, the same again with smaller tiles."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

log = logging.getLogger("posttrain.kernels")

T = TypeVar("T")

LEAST = 1 << 20
"""Bytes of workspace below which nothing would be gained: what is left are inputs and results."""

_limits: dict[str, int] = {}
"""Device type -> bytes of workspace that fitted there, once more did not."""


def limited(workspace: int, device: torch.device) -> int:
    """The workspace, or less where that much did not fit before."""
    return min(workspace, _limits.get(device.type, workspace))


def with_less(attempt: Callable[[int], T], workspace: int, device: torch.device) -> T:
    """`attempt(workspace)`; as often as memory runs out, again with half of it, for the rest of the process.

    Raises:
        RuntimeError, MemoryError: it does not do with the least either; or something else went wrong.
    """
    workspace = limited(workspace, device)
    while True:
        try:
            return attempt(workspace)
        except (RuntimeError, MemoryError) as error:
            if not _ran_out(error) or workspace <= LEAST:
                raise
        # Outside of the handler, which holds on to the frames of the failed attempt and so to its memory.
        if device.type == "cuda":
            torch.cuda.empty_cache()
        workspace //= 2
        if device.type not in _limits:
            log.warning("memory ran out in the kernel: its workspace is now %d MiB", workspace >> 20)
        _limits[device.type] = workspace


def _ran_out(error: Exception) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
