"""The passes over a tile in Triton: each reads a tile once, where the same by torch operations reads it many times.

cuBLAS writes a tile [n, C] of products in float32; one program per token then holds its C numbers in registers. Three kernels:

    fold          bias, scale, soft-cap and temperature, then the state of the token (fold.py) with the tile taken in
    divergences   the terms of two heads' divergences, and of their C, summed over the tile
    gradient      the derivative in the products (gradient.py), written in the dtype of the operands of the next product

Loops, schedules and numbers are those of chunked.py; the products have no `tl.dot`. Where a wanted statistic is a `Rowwise`,
or a `Separable` without a formula (formulas.py), divergences and gradient are left to torch, and only the fold is Triton's.
`top_k`, `l1_cost` and `span_cost` stay with torch.

Runs on NVIDIA GPUs, and on a CPU in Triton's interpreter (TRITON_INTERPRET=1 before triton is imported: for tests, as it takes
milliseconds for each token and tile).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fold import State
from .formulas import FORMULAS, formula
from .gradient import Coefficients
from .head import FLOOR, Head, Rowwise, Separable, Want
from .kept import TORCH, Kept
from .task import Passes, Result, Task

_FLOOR = tl.constexpr(FLOOR)
_LEAST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _logits(z, columns, inside, row, bias, temperature, stride, constant, SCALE: tl.constexpr, CAP: tl.constexpr):
    """Logits of one token from the products z at some columns; `columns` count from where `bias` points."""
    if bias is not None:
        z += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if SCALE != 1:
        z = z * SCALE
    if CAP is not None:
        e = tl.exp(-2 * tl.abs(z / CAP))
        z = tl.where(z < 0, e - 1, 1 - e) / (1 + e) * CAP
    return z / _cooling(row, temperature, stride, constant)


@triton.jit
def _cooling(row, temperature, stride, constant):
    """The temperature of a token."""
    if temperature is not None:
        constant = tl.load(temperature + row * stride).to(tl.float32)
    return constant


@triton.jit
def _fold(
    z, z_stride, width, start, ids, at, count, m, r, argmax, e1, e2,
    bias, temperature, stride, constant, SCALE: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(z + row * z_stride + columns, mask=inside, other=0.0)
    x = _logits(x, columns, inside, row, bias, temperature, stride, constant, SCALE, CAP)
    x = tl.where(inside, x, float("-inf"))
    best, place = tl.max(x, 0, return_indices=True)
    best = tl.maximum(best, _LEAST)
    e = tl.exp(x - best)
    rest = tl.sum(tl.where(columns == place, 0.0, e), 0)

    before, its_rest = tl.load(m + row), tl.load(r + row)
    new = tl.maximum(before, best)
    down, other_down = tl.maximum(before - new, _FLOOR), tl.maximum(best - new, _FLOOR)
    mine, other = tl.exp(down), tl.exp(other_down)
    beaten = tl.minimum(mine, other)
    tl.store(m + row, new)
    tl.store(r + row, its_rest * mine + rest * other + beaten)
    if best > before:
        tl.store(argmax + row, (place + start).to(tl.int64))
    if e1 is not None:
        found = tl.sum(e * tl.maximum(x - best, _FLOOR), 0)
        its = tl.load(e1 + row) + down * (1 + its_rest)
        tl.store(e1 + row, its * mine + (found + other_down * (1 + rest)) * other)
    if e2 is not None:
        found = tl.sum(tl.where(columns == place, 0.0, e * e), 0)
        tl.store(e2 + row, tl.load(e2 + row) * mine * mine + found * other * other + beaten * beaten)
    if K > 0:
        slot = tl.arange(0, K)
        column = tl.load(ids + row * count + slot, mask=slot < count, other=-1) - start
        here = (column >= 0) & (column < width)
        picked = tl.load(z + row * z_stride + column, mask=here, other=0.0)
        picked = _logits(picked, column, here, row, bias, temperature, stride, constant, SCALE, CAP)
        tl.store(at + row * count + slot, picked, mask=here)


@triton.jit
def _divergences(
    z, z_stride, zq, zq_stride, width, common, reference, sums, n,
    bias, temperature, stride, constant, SCALE: tl.constexpr, CAP: tl.constexpr,
    NAMES: tl.constexpr, PARAMETERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(z + row * z_stride + columns, mask=inside, other=0.0)
    x = _logits(x, columns, inside, row, bias, temperature, stride, constant, SCALE, CAP)
    lp = tl.maximum(x - tl.load(common + row), _FLOOR)
    lq = tl.load(zq + row * zq_stride + columns, mask=inside, other=0.0)
    lq = tl.maximum(lq - tl.load(reference + row), _FLOOR)
    for i in tl.static_range(len(NAMES)):
        f, slope = formula(lp, lq, NAMES, PARAMETERS, i)
        f, slope = tl.where(inside, f, 0.0), tl.where(inside & (lp > _FLOOR), slope, 0.0)
        place = sums + 2 * i * n + row
        tl.store(place, tl.load(place) + tl.sum(f, 0))
        tl.store(place + n, tl.load(place + n) + tl.sum(slope, 0))


@triton.jit
def _gradient(
    z, z_stride, out, out_stride, width, start, lse, c0, c1, c2, at_max, argmax, ids, add, count,
    zq, zq_stride, common, reference, pairs, n,
    bias, temperature, stride, constant, SCALE: tl.constexpr, CAP: tl.constexpr,
    NAMES: tl.constexpr, PARAMETERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(z + row * z_stride + columns, mask=inside, other=0.0)
    x = _logits(x, columns, inside, row, bias, temperature, stride, constant, SCALE, CAP)
    dz = tl.zeros([BLOCK], tl.float32)
    if at_max is not None:
        lp = x - tl.load(lse + row)
        dz = tl.exp(lp)
        if (c1 is not None) or (c2 is not None):
            slope = tl.load(c0 + row) + tl.zeros([BLOCK], tl.float32)
            if c1 is not None:
                slope += tl.load(c1 + row) * tl.maximum(lp, _FLOOR)
            if c2 is not None:
                slope += tl.load(c2 + row) * dz
            dz = slope * dz
        elif c0 is not None:
            dz = tl.load(c0 + row) * dz
        dz = tl.where(columns + start == tl.load(argmax + row), tl.load(at_max + row), dz)
        if add is not None:
            for k in range(count):
                column = tl.load(ids + row * count + k) - start
                if (column >= 0) & (column < width):
                    dz += tl.where(columns == column, tl.load(add + row * count + k), 0.0)
    if pairs is not None:
        lp = tl.maximum(x - tl.load(common + row), _FLOOR)
        lq = tl.load(zq + row * zq_stride + columns, mask=inside, other=0.0)
        lq = tl.maximum(lq - tl.load(reference + row), _FLOOR)
        p = tl.exp(lp)
        for i in tl.static_range(len(NAMES)):
            _, slope = formula(lp, lq, NAMES, PARAMETERS, i)
            place = pairs + 2 * i * n + row
            dz += tl.load(place) * (tl.where(lp > _FLOOR, slope, 0.0) - tl.load(place + n) * p)
    if CAP is not None:
        t = x * (_cooling(row, temperature, stride, constant) / CAP)
        dz = dz * (1 - t * t)
    tl.store(out + row * out_stride + columns, dz.to(out.dtype.element_ty), mask=inside)


def _launch(width: int) -> dict[str, int | bool]:
    """How a program over so many columns is laid out: at most 16 numbers a thread, so that what it computes fits registers."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 4), 16), "enable_fp_fusion": True}


def _raw(head: Head | None, start: int, stop: int, rows: slice) -> dict[str, Tensor | float | None]:
    """What `_logits` needs of a head whose tile holds products; None: the tile holds logits, which stay as they are."""
    if head is None:
        return {"bias": None, "temperature": None, "stride": 0, "constant": 1.0, "SCALE": 1.0, "CAP": None}
    temperature, stride = head.temperature, 0
    if isinstance(temperature, Tensor) and temperature.dim():
        temperature, stride = temperature[rows], temperature.stride(0)
    by_number = not isinstance(temperature, Tensor)
    return {
        "bias": None if head.bias is None else head.bias[start:stop],
        "temperature": None if by_number else temperature,
        "stride": stride,
        "constant": float(temperature) if by_number else 1.0,
        "SCALE": float(head.scale),
        "CAP": None if head.softcap is None else float(head.softcap),
    }


def fold(raw: Head | None, state: State, z: Tensor, start: int, rows: slice, ids: Tensor, scratch: Tensor) -> None:
    """`State.fold`, for the tokens that are no padding; leaves the tile as it is."""
    n, width = rows.stop - rows.start, z.shape[1]
    count = ids.shape[1]
    with torch.cuda.device_of(z):
        _fold[(n,)](
            z, z.stride(0), width, start, ids, state.at, count, state.m, state.r, state.argmax, state.e1, state.e2,
            **_raw(raw, start, start + width, rows), **_launch(width), K=triton.next_power_of_2(count) if count else 0,
        )  # fmt: skip


def divergences(task: Task, result: Result, rows: slice, kept: Kept) -> None:
    """Values and, if asked for, C of the divergences of a block of tokens."""
    n = rows.stop - rows.start
    sums = result.state.m.new_zeros(len(task.divergences), 2, n)
    common, reference = result.state.common[rows], result.reference[rows]
    # The tiles of the common vocabulary come first in both.
    with torch.cuda.device_of(sums):
        for (start, stop), z, zq in zip(task.tiles(task.head), *kept, strict=False):
            _divergences[(n,)](
                z, z.stride(0), zq, zq.stride(0), stop - start, common, reference, sums, n,
                **_raw(task.head, start, stop, rows), **_launch(stop - start), **_formulas(task, task.divergences),
            )  # fmt: skip
    for name, (value, total) in zip(task.divergences, sums, strict=True):
        result.values[name][rows] = value
        if name in result.sums:
            result.sums[name][rows] = total


def gradient(task: Task, own: Coefficients, z: Tensor, zq: Tensor | None, start: int, rows: slice) -> Tensor:
    """The derivative in the products of a tile, over the row factor; for products in one narrow dtype, in that dtype."""
    head, (n, width) = task.head, z.shape
    same = head.x.device.type != "cpu" and head.bias is None and all(x.dtype == head.x.dtype for x, _ in head.terms)
    out = z if not same or head.x.dtype == z.dtype else torch.empty_like(z, dtype=head.x.dtype)
    names = list(own.pairs) if zq is not None else []
    pairs = torch.stack([number for name in names for number in own.pairs[name]]).contiguous() if names else None
    of_row = [own.lse, own.c0, own.c1, own.c2, own.at_max, own.argmax, own.ids, own.add]
    of_pair = [own.common, own.reference] if names else [None, None]
    of_row, of_pair = ([None if it is None else it.contiguous() for it in group] for group in (of_row, of_pair))
    with torch.cuda.device_of(z):
        _gradient[(n,)](
            z, z.stride(0), out, out.stride(0), width, start, *of_row, own.ids.shape[1],
            zq if names else None, zq.stride(0) if names else 0, *of_pair, pairs, n,
            **_raw(head, start, start + width, rows), **_launch(width), **_formulas(task, names),
        )  # fmt: skip
    return out


def _formulas(task: Task, names: Sequence[str]) -> dict[str, tuple[str, ...] | tuple[float, ...]]:
    formulas = [task.divergences[name].formula for name in names]
    return {"NAMES": tuple(name for name, _ in formulas), "PARAMETERS": tuple(number for _, number in formulas)}


WHOLE = Passes(fold, divergences, gradient, temporaries=3, alone=2, raw=True)
"""All by Triton. A policy's tiles stay products throughout; those of the ref are made logits by torch."""

FOLD = dataclasses.replace(TORCH, fold=fold, streams=False)
"""Only the fold by Triton."""


def passes_for(want: Sequence[Want]) -> Passes:
    """Who goes over the tiles for these statistics."""
    for entry in want:
        if isinstance(entry, Rowwise) or (isinstance(entry, Separable) and (entry.formula or ("",))[0] not in FORMULAS):
            return FOLD
    return WHOLE
