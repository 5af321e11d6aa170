"""Which implementation computes a call; looks without importing triton."""

from __future__ import annotations

import functools
import logging
import os
from importlib.metadata import PackageNotFoundError, version

import torch

from .head import Head

log = logging.getLogger("posttrain.kernels")

_TRITON = (3, 6)
"""The oldest that fused.py was written for."""

_CAPABILITY = (8, 0)
"""The oldest NVIDIA GPU that Triton and bfloat16 products know."""


IMPLEMENTATIONS = ("dense", "chunked", "fused")

VARIABLE = "POSTTRAIN_KERNEL"
"""Environment variable that says what `auto` is, for all calls of a process."""


def implementation(impl: str, head: Head, ref: Head | None) -> str:
    """What computes a call.

    Raises:
        ValueError: no such implementation; or `fused` where it cannot run.
    """
    where = "impl"
    if impl == "auto" and VARIABLE in os.environ:
        where, impl = VARIABLE, os.environ[VARIABLE]
    if impl == "auto" and not head.x.is_cuda:
        return "chunked"
    reason = why_not_fused(head, ref) if impl in ("auto", "fused") else None
    if impl == "auto":
        return "fused" if reason is None else _without(reason)
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{where}: no implementation {impl!r}; possible: auto, {', '.join(IMPLEMENTATIONS)}")
    if reason is not None:
        raise ValueError(f"{where}: fused: {reason}")
    return impl


@functools.cache
def _without(reason: str) -> str:
    """What a GPU does then; said once."""
    log.warning("the kernel does without Triton here: %s", reason)
    return "chunked"


def why_not_fused(head: Head, ref: Head | None = None) -> str | None:
    """What keeps `impl="fused"` from computing these heads here, in words that follow "fused:"; None: nothing does."""
    device = head.x.device
    for role, one in (("head", head), ("ref", ref)):
        if one is not None and one.dtype != torch.float32:
            return f"the {role} is {one.x.dtype}; hidden states of 32 bits or less are needed"
    if device.type == "cuda" and torch.version.cuda is None:
        return "the GPU is not NVIDIA's"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _CAPABILITY:
        return f"the GPU is too old (compute capability below {'.'.join(map(str, _CAPABILITY))})"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the hidden states are on {device.type}; an NVIDIA GPU is needed, or TRITON_INTERPRET=1"
    return _triton()


@functools.cache
def _triton() -> str | None:
    """What is wrong with triton, if anything."""
    try:
        found = version("triton")
    except PackageNotFoundError:
        return "triton is not installed"
    if tuple(int(part) for part in found.split(".")[:2]) < _TRITON:
        return f"triton {found} is too old; {'.'.join(map(str, _TRITON))} or later is needed"
    return None
