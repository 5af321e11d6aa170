"""Where numbers were measured: date, class of machine, versions."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version


def machine() -> str:
    """The class of machine that this process computes on, as in `2 cores, x86_64 AVX2, no GPU`."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores, {platform.machine()} {torch.backends.cpu.get_cpu_capability()}, no GPU"


def versions(*packages: str) -> str:
    """The installed ones of these packages with their versions, as in `torch 2.13.0, trl 1.16.0`."""
    found = []
    for name in packages:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def stamp(*packages: str) -> str:
    """The line that stands above a table."""
    return f"{datetime.date.today()}; {machine()}; {versions('torch', 'transformers', *packages)}"
