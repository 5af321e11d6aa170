"""The statistics without an [N, V] tensor: one autograd function over blocks of tokens and tiles of the vocabulary.

Forward: for each tile of the vocabulary and block of tokens, project and fold (fold.py). What needs both normalisers first
(divergences), whole rows, or a gradient in the forward keeps the logits of one block of tokens and goes over them again.

Backward, three schedules:
    deferred    project again (backward.py) what was not held; `keep` says how much of it is.
    row-scale   frozen head: d(sum_n u_n S_n)/dx_n = u_n g_n with g_n = (dS_n/dz) W known in the forward; the backward scales
                rows. For one statistic (the eager one, else logp if wanted); gradients of the others are deferred.
    eager       trained head, one statistic whose u_n the caller expects to be equal: the forward has taken all its gradients
                for u = 1, the backward scales them; deferred if the u_n differ after all.

Every projection of a forward has the same shape but for a shorter last block of tokens, padded to a multiple of `pad`, so a
token's logits have the same bits in any batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .backward import backward_pass
from .fold import State
from .forward import forward_pass
from .head import CONSTANT, KLS, Form, Head, Rowwise, Separable, Want, name_of, names_of
from .kept import TORCH
from .memory import limited, with_less
from .task import Gradients, Need, Passes, Result, Sizes, Task

_CPU = {"workspace": 64 << 20, "rows": 256, "pad": 32, "items": 2048, "block": 1024, "kept": 1024, "chunk": 2048}
_OTHER = {"workspace": 1 << 30, "rows": 1024, "pad": 1024, "items": 8192, "block": 1024, "kept": 4096, "chunk": 32768}
"""Defaults: workspace in bytes, tokens of a product and what the last is padded to, width of a tile, most tokens of a fold, of
a block whose logits are kept and of a backward chunk. Measured on a CPU (larger ones are no faster); the others are estimates
for a GPU: a tile that is folded at once (32 MiB) stays in its L2 cache between the product and the fold."""


def _defaults(head: Head) -> dict[str, int]:
    return _CPU if head.x.device.type == "cpu" else _OTHER


def workspace_of(head: Head, workspace: int | None) -> int:
    """Bytes of temporary memory to aim at: those given, or the default of the device; less where less has been found to fit."""
    return limited(_defaults(head)["workspace"] if workspace is None else workspace, head.x.device)


def sizes_of(head: Head, workspace: int | None, temporaries: int, whole: int, folding: int = TORCH.temporaries) -> Sizes:
    """How the loops are cut for a head.

    Args:
        temporaries: the number of tiles a gradient needs at once.
        whole: the number of whole rows that a Rowwise needs at once for each token; 0 without one.
        folding: the number of tiles a fold needs at once.
    """
    default, workspace = _defaults(head), workspace_of(head, workspace)
    pad, itemsize = default["pad"], head.dtype.itemsize
    items = min(max(workspace // (8 * pad * itemsize) // 64 * 64, 64), default["items"], head.size)

    def tokens(width: int, most: int) -> int:
        """How many tokens with `width` numbers each the workspace holds."""
        return min(max(workspace // (width * itemsize) // pad * pad, pad), most)

    rows = tokens(folding * items, default["rows"])
    block = tokens(folding * items, default["block"]) // rows * rows
    kept = tokens(head.size + folding * items, default["kept"])
    kept = kept // rows * rows or kept
    chunk = tokens(temporaries * items, default["chunk"])
    beside = workspace // 4  # the logits of the block are kept, too
    return Sizes(rows, pad, items, block, kept, chunk, whole=max(beside // (max(whole, 1) * head.size * itemsize), 1))


_X = 2
"""Place of the hidden states in `Head.tensors`."""


@dataclass(frozen=True)
class _Plan:
    """The part of a call that is not tensors."""

    want: tuple[Want, ...]
    workspace: int
    """Bytes of temporary memory to aim at."""

    temporaries: int
    whole: int
    """As in `sizes_of`."""

    passes: Passes

    forms: tuple[Form, ...]
    """Of the head and, if it is read, the ref."""

    need: Need
    eager: str | None
    keep: int

    @property
    def names(self) -> list[str]:
        return names_of(self.want)

    @property
    def constant(self) -> set[str]:
        """The statistics without gradient."""
        return {*CONSTANT, *self.names[len(self.want) :]}

    @property
    def unit(self) -> str | None:
        """The statistic whose gradient is taken in the forward."""
        if self.eager or self.need.head:
            return self.eager
        names = [name for name in self.names if name not in {*self.constant, "gather"}]
        return "logp" if "logp" in names else next(iter(names), None)

    def task(self, tensors: Sequence[Tensor | None], workspace: int) -> Task:
        """The inputs put together again; `tensors` are target, index, and those of the heads."""
        at = 2 + self.forms[0].count
        head = self.forms[0].head(tensors[2:at])
        ref = self.forms[1].head(tensors[at:]) if len(self.forms) > 1 else None
        divergences = {name_of(e): e if isinstance(e, Separable) else KLS[e] for e in self.want if _is_divergence(e)}
        rowwise = {entry.name: entry for entry in self.want if isinstance(entry, Rowwise)}
        sizes = sizes_of(head, workspace, self.temporaries, self.whole, self.passes.temporaries)
        return Task(head, ref, tensors[0], tensors[1], self.names, divergences, rowwise, sizes, self.passes)

    def forward(self, tensors: Sequence[Tensor | None], unit: str | None, need: Need | None) -> Result:
        """The forward pass, in as much memory as there is."""
        return with_less(
            lambda workspace: forward_pass(
                self.task(tensors, workspace),
                unit=unit,
                need=need,
                hold=self.keep if workspace == self.workspace else 0,  # where memory ran out, nothing is held
            ),
            self.workspace,
            tensors[2 + _X].device,
        )

    def backward(self, tensors: Sequence[Tensor | None], result: Result, upstream: Mapping[str, Tensor]) -> Gradients:
        """The backward pass, in as much memory as there is."""
        return with_less(
            lambda workspace: backward_pass(self.task(tensors, workspace), result, upstream, self.need),
            self.workspace,
            tensors[2 + _X].device,
        )

    def read(self, result: Result) -> list[Tensor]:
        """The wanted statistics in order."""
        first = int("logp" in self.names)
        return [result.values[name] if name in result.values else result.state.read(name, first) for name in self.names]


def _is_divergence(entry: Want) -> bool:
    return isinstance(entry, Separable) or entry in KLS


def chunked_stats(
    head: Head,
    want: Sequence[Want],
    *,
    target: Tensor | None,
    index: Tensor | None,
    ref: Head | None,
    workspace: int | None,
    eager: str | None,
    keep: int = 0,
    passes: Passes = TORCH,
) -> dict[str, Tensor]:
    """`head_stats` without an [N, V] tensor; `passes` go over the elements of the tiles."""
    names = names_of(want)
    rowwise = [entry for entry in want if isinstance(entry, Rowwise)]
    both = ref is not None and (rowwise or any(_is_divergence(entry) or entry in ("ref_logp", "ref_lse") for entry in want))
    heads = [head, ref] if both else [head]
    need = Need.of(head)
    single = head.softcap is None and not set(names) - {"logp", "lse", "max_logp", *CONSTANT}
    cut = {
        "temporaries": passes.alone if single else passes.temporaries,
        "whole": max((entry.temporaries for entry in rowwise), default=0),
    }
    forms = tuple(Form.of(one) for one in heads)
    plan = _Plan(
        tuple(want), workspace_of(head, workspace), **cut, passes=passes, forms=forms, need=need, eager=eager, keep=keep
    )
    read_target = target if "logp" in names or "ref_logp" in names or rowwise else None
    inputs = [read_target, index if "gather" in names else None, *(tensor for one in heads for tensor in one.tensors)]
    if need.any:
        values = _Statistics.apply(plan, *inputs)
    else:
        with torch.no_grad():
            values = plan.read(plan.forward(inputs, unit=None, need=None))
    return dict(zip(names, values, strict=True))


class _Statistics(torch.autograd.Function):
    """Inputs: the plan, target, index, and the tensors of the heads. Outputs: the statistics in the order wanted."""

    @staticmethod
    def forward(ctx: FunctionCtx, plan: _Plan, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        result = plan.forward(inputs, unit=plan.unit, need=plan.need)
        outputs = plan.read(result)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(v for name, v in zip(plan.names, outputs, strict=True) if name in plan.constant))
        ctx.plan, ctx.sums, ctx.inputs, ctx.unit = plan, tuple(result.sums), len(inputs), result.unit
        ctx.held = result.held
        # The inputs are saved as they came: a parameter whose data is swapped between the passes (ZeRO-3) is read anew.
        ctx.save_for_backward(*inputs, *result.state.tensors(), result.reference, *result.sums.values())
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) for _ in range(ctx.inputs)]
        state = State(*(next(saved) for _ in fields(State)))
        result = Result(state, next(saved), {}, {name: next(saved) for name in ctx.sums}, None, ctx.held)
        ctx.held = {}
        upstream = {name: grad for name, grad in zip(plan.names, grads, strict=True) if grad is not None}
        ready = _scaled_unit(ctx, upstream.get(plan.unit))
        if ready is not None:
            del upstream[plan.unit]
        out = plan.backward(inputs, result, upstream) if upstream or ready is None else None
        found = _sum(out, ready).like(plan.forms[0].head(inputs[2 : 2 + plan.forms[0].count]))
        return (None, None, None, *found, *[None] * (ctx.inputs - 2 - len(found)))


def _scaled_unit(ctx: FunctionCtx, upstream: Tensor | None) -> Gradients | None:
    """The gradients that the forward took, times `upstream`; None if there are none, or not for such an upstream."""
    unit: Gradients | None = ctx.unit
    if unit is None or upstream is None:
        return None
    if not ctx.plan.need.head:
        return Gradients([None if dx is None else dx * upstream[:, None] for dx in unit.x], unit.weight, None)
    if len(upstream) and upstream.stride(0) and not (upstream == upstream[0]).all():
        return None
    ctx.unit = None  # handed over rather than copied: dW is large. A second backward of the same graph is deferred.
    for total in (*unit.x, *unit.weight, unit.bias):
        if total is not None and len(upstream):
            total.mul_(upstream[0])
    return unit


def _sum(a: Gradients | None, b: Gradients | None) -> Gradients:
    """The sum of two, of which one may be missing; overwrites b."""
    if a is None or b is None:
        return a or b
    for total, more in zip((*b.x, *b.weight, b.bias), (*a.x, *a.weight, a.bias), strict=True):
        if total is not None:
            total.add_(more)
    return b
