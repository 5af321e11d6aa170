"""The statistics without an [N, V] tensor: one autograd function over blocks of tokens and tiles of the vocabulary.

Forward: for each tile of the vocabulary and block of tokens, project and fold (fold.py). What needs both normalisers first
(divergences) or a gradient in the forward keeps the logits of one block of tokens and goes over them again.

Backward, two schedules:
    deferred    project again; vocabulary outermost, so each tile of dW is summed over all tokens and written once, in the
                dtype of the parameter.
    row-scale   frozen head: d(sum_n u_n S_n)/dx_n = u_n g_n with g_n = (dS_n/dz) W known in the forward; the backward scales
                rows. For one statistic (logp if wanted); gradients of the others are deferred.

Every projection of a forward has the same shape but for a shorter last block of tokens, padded to a multiple of `pad`, so a
token's logits have the same bits in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .fold import State
from .head import KLS, Head, Separable, Want, name_of
from .passes import Result, Sizes, Task, backward_pass, forward_pass

_CPU = {"workspace": 64 << 20, "rows": 256, "pad": 32, "items": 2048, "block": 1024, "chunk": 2048}
_OTHER = {"workspace": 1 << 30, "rows": 1024, "pad": 1024, "items": 8192, "block": 4096, "chunk": 32768}
"""Defaults: workspace in bytes, tokens of a product and what the last is padded to, width of a tile, most tokens of a fold and
of a backward chunk. Measured on a CPU (larger ones are no faster); the others are estimates for a GPU."""

_CONSTANT = ("argmax", "ref_logp")
"""Statistics without a gradient."""


def sizes_of(head: Head, workspace: int | None, temporaries: int) -> Sizes:
    """How the loops are cut for a head; `temporaries` is the number of tiles a gradient needs at once."""
    default = _CPU if head.x.device.type == "cpu" else _OTHER
    if workspace is None:
        workspace = default["workspace"]
    pad, itemsize = default["pad"], head.dtype.itemsize
    items = min(max(workspace // (8 * pad * itemsize) // 64 * 64, 64), default["items"], head.size)

    def tokens(width: int, most: int) -> int:
        """How many tokens with `width` numbers each the workspace holds."""
        return min(max(workspace // (width * itemsize) // pad * pad, pad), most)

    rows = tokens(8 * items, default["rows"])
    block = tokens(8 * items, default["block"]) // rows * rows
    kept = tokens(head.size + 8 * items, default["block"])
    kept = kept // rows * rows or kept
    return Sizes(rows, pad, items, block, kept, chunk=tokens(temporaries * items, default["chunk"]))


@dataclass(frozen=True)
class _Plan:
    """The part of a call that is not tensors."""

    want: tuple[Want, ...]
    sizes: Sizes
    heads: tuple[tuple[float, float | None, float, int, int], ...]
    """(scale, softcap, temperature if a number, vocab, number of tensors) of the head and, if it is read, the ref."""

    needs: tuple[bool, ...]
    """Which of the head's tensors (bias, temperature, x, weight, x_1, W_1, ...) want a gradient."""

    @property
    def names(self) -> list[str]:
        return [name_of(entry) for entry in self.want]

    @property
    def row_scale(self) -> str | None:
        """The statistic whose gradient is taken in the forward: None unless the head is frozen and its input is not."""
        bias, _, *terms = self.needs
        if bias or any(terms[1::2]) or not any(terms):
            return None
        names = [name for name in self.names if name not in (*_CONSTANT, "gather")]
        return "logp" if "logp" in names else next(iter(names), None)

    def task(self, tensors: Sequence[Tensor | None]) -> Task:
        """The inputs put together again; `tensors` are target, index, and those of the heads."""
        heads, at = [], 2
        for scale, softcap, temperature, vocab, count in self.heads:
            bias, temperatures, x, weight, *extra = tensors[at : at + count]
            pairs = tuple(zip(extra[::2], extra[1::2], strict=True))
            temperature = temperature if temperatures is None else temperatures
            heads.append(Head(x, weight, pairs, bias, scale, softcap, temperature, vocab))
            at += count
        divergences = {name_of(e): e if isinstance(e, Separable) else KLS[e] for e in self.want if _is_divergence(e)}
        ref = heads[1] if len(heads) > 1 else None
        return Task(heads[0], ref, tensors[0], tensors[1], self.names, divergences, self.sizes)

    def read(self, result: Result) -> list[Tensor]:
        """The wanted statistics in order."""
        first = int("logp" in self.names)
        return [result.values[name] if name in result.values else result.state.read(name, first) for name in self.names]


def _is_divergence(entry: Want) -> bool:
    return isinstance(entry, Separable) or entry in KLS


def chunked_stats(
    head: Head, want: Sequence[Want], *, target: Tensor | None, index: Tensor | None, ref: Head | None, workspace: int | None
) -> dict[str, Tensor]:
    """`head_stats` without an [N, V] tensor."""
    names = [name_of(entry) for entry in want]
    heads = [head, ref] if any(_is_divergence(entry) or entry == "ref_logp" for entry in want) else [head]
    tensors, options = [], []
    for one in heads:
        temperature = one.temperature if isinstance(one.temperature, Tensor) else None
        number = one.temperature if temperature is None else 1.0
        flat = [one.bias, temperature, *(tensor for term in one.terms for tensor in term)]
        tensors += flat
        options.append((one.scale, one.softcap, number, one.size, len(flat)))
    needs = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors[: options[0][4]])
    single = head.softcap is None and not set(names) - {"logp", "lse", "max_logp", *_CONSTANT}
    sizes = sizes_of(head, workspace, 1 if single else 8)
    plan = _Plan(tuple(want), sizes, tuple(options), needs)
    read_target = target if "logp" in names or "ref_logp" in names else None
    inputs = [read_target, index if "gather" in names else None, *tensors]
    if any(needs):
        values = _Statistics.apply(plan, *inputs)
    else:
        with torch.no_grad():
            values = plan.read(forward_pass(plan.task(inputs), row_scale=None, grad=False))
    return dict(zip(names, values, strict=True))


class _Statistics(torch.autograd.Function):
    """Inputs: the plan, target, index, and the tensors of the heads. Outputs: the statistics in the order wanted."""

    @staticmethod
    def forward(ctx: FunctionCtx, plan: _Plan, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        result = forward_pass(plan.task(inputs), row_scale=plan.row_scale, grad=True)
        outputs = plan.read(result)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(v for name, v in zip(plan.names, outputs, strict=True) if name in _CONSTANT))
        ctx.plan, ctx.sums, ctx.inputs = plan, tuple(result.sums), len(inputs)
        # The inputs are saved as they came: a parameter whose data is swapped between the passes (ZeRO-3) is read anew.
        ctx.save_for_backward(*inputs, *result.state.tensors(), result.reference, *result.sums.values(), *result.gradients)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        saved = iter(ctx.saved_tensors)
        task = plan.task([next(saved) for _ in range(ctx.inputs)])
        state = State(*(next(saved) for _ in fields(State)))
        result = Result(state, next(saved), {}, {name: next(saved) for name in ctx.sums}, list(saved))
        upstream = {name: grad for name, grad in zip(plan.names, grads, strict=True) if grad is not None}
        need_bias, _, *terms = plan.needs
        need_x, need_weight = terms[::2], terms[1::2]
        scale = upstream.pop(plan.row_scale) if result.gradients and plan.row_scale in upstream else None
        out = backward_pass(task, result, upstream, need_x, need_weight, need_bias)
        if scale is not None:
            for total, unit in zip(out.x, result.gradients, strict=True):
                if total is not None:
                    total.addcmul_(unit, scale[:, None])
        dx = [None if d is None else d.to(x.dtype) for d, (x, _) in zip(out.x, task.head.terms, strict=True)]
        pairs = [gradient for pair in zip(dx, out.weight, strict=True) for gradient in pair]
        rest = [None] * (ctx.inputs - 4 - len(pairs))
        return (None, None, None, out.bias, None, *pairs, *rest)
