"""From hidden states to a tile of logits and back: matrix products with logits and sums in float32 or better.

On the CPU bfloat16 and float16 operands are widened to float32 (exact), because a product there comes out in the dtype of
its operands; `exact_products` lets oneDNN multiply such operands at bfloat16 speed where the processor can. Elsewhere they
stay as they are and the product comes out in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .head import Head


@contextmanager
def exact_products(x: Tensor) -> Iterator[None]:
    """Products of operands rounded to the dtype of x, with float32 results; no autocast."""
    with torch.autocast(device_type=x.device.type, enabled=False):
        if x.device.type != "cpu" or x.dtype != torch.bfloat16:
            yield
            return
        matmul = torch.backends.mkldnn.matmul
        before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
        try:
            yield
        finally:
            matmul.fp32_precision = before


def operand(value: Tensor, x: Tensor) -> Tensor:
    """`value` rounded to the dtype of x, in the form `accumulate` multiplies."""
    rounded = value.to(x.dtype)
    return rounded.to(torch.promote_types(x.dtype, torch.float32)) if x.device.type == "cpu" else rounded


def narrow(dz: Tensor, x: Tensor) -> Tensor:
    """A tile of gradients as an operand: rounded once to the dtype of x where products are taken in it."""
    return dz if x.device.type == "cpu" else dz.to(x.dtype)


def accumulate(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> Tensor:
    """out = a @ b, or out += a @ b, in the dtype of `out`."""
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, beta=int(add), out=out)
    return torch.addmm(out, a, b, beta=int(add), out_dtype=out.dtype, out=out)


def tile_weights(head: Head, start: int, stop: int) -> list[Tensor]:
    """[C, H] rows start..stop of the weight of every term, as operands."""
    return [operand(weight[start:stop], x) for x, weight in head.terms]


def logits_tile(head: Head, weights: list[Tensor], start: int, rows: slice, out: Tensor, *, raw: bool = False) -> Tensor:
    """[n, C] logits of the tokens `rows` for the items from `start`; rows of `out` beyond the last token are padding.

    Args:
        raw: leave it at the sum of the products, without bias, scale, soft-cap and temperature.
    """
    for i, ((x, _), weight) in enumerate(zip(head.terms, weights, strict=True)):
        block = x[rows]
        if len(block) < len(out):
            block = torch.cat([block, block.new_zeros(len(out) - len(block), block.shape[1])])
        accumulate(out, operand(block, x), weight.mT, add=i > 0)
    return out if raw else finish(head, start, rows, out)


def finish(head: Head, start: int, rows: slice, out: Tensor) -> Tensor:
    """Turn the sum of the products into logits, in place."""
    if head.bias is not None:
        out.add_(head.bias[start : start + out.shape[1]])
    if head.scale != 1:
        out.mul_(head.scale)
    if head.softcap is not None:
        out.div_(head.softcap).tanh_().mul_(head.softcap)
    temperature = head.temperature
    if isinstance(temperature, Tensor) and temperature.dim():
        column = temperature[rows].to(out.dtype)
        out[: len(column)].div_(column[:, None])
    elif isinstance(temperature, Tensor) or temperature != 1:
        out.div_(temperature)
    return out


def softcap_slope(head: Head, z: Tensor, rows: slice) -> Tensor | None:
    """[n, C] derivative of the soft-cap at final logits z, or None without one."""
    if head.softcap is None:
        return None
    temperature = head.temperature
    if isinstance(temperature, Tensor) and temperature.dim():
        temperature = temperature[rows, None].to(z.dtype)
    return (z * (temperature / head.softcap)).square_().neg_().add_(1)


def row_factor(head: Head, factor: Tensor, rows: slice) -> Tensor:
    """[n, 1] `factor` of the tokens `rows` times the constant part of d logits / d (x W^T): scale / temperature."""
    temperature = head.temperature
    if isinstance(temperature, Tensor):
        temperature = temperature[rows, None].to(factor.dtype) if temperature.dim() else temperature
    return factor * (head.scale / temperature)
