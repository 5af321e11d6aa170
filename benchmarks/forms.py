"""The forms in which `benchmarks.kernel` computes a statistic: plain torch on all logits, TRL's, Liger's and Apple's, and ours.

A form is a function of the hidden states, the weight and what else the statistic reads, to [N] values; `None` in its place
means that it does not compute this statistic in this case, or is not installed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib.util import find_spec

import torch
from posttrain_kernels import KLS, Head, Separable, head_stats
from torch import Tensor

from posttrain.divergences import divergence
from posttrain.objectives.distillation.dackl import log_gates
from posttrain.registry import find
from posttrain.stats import Rowwise
from posttrain.vocabulary import statistics

Form = Callable[..., Tensor]
"""logp: (x [N, H], weight [V, H], target [N]) -> [N]; two heads: (x, weight, and both of the teacher) -> [N]."""

FORMS = {
    "naive": "all logits",
    "naive32": "the same, float32 products",
    "trl": "TRL",
    "liger": "Liger",
    "cce": "cut-cross-entropy",
    "ours": "posttrain_kernels",
    "eager": "posttrain_kernels, eager",
    "held": "posttrain_kernels, all logits held",
    "chunked": "posttrain_kernels, without Triton",
}
"""Name -> how the table calls it."""

ADAPTIVE = ("akl", "dackl")
"""Statistics that are the loss of an objective rather than a divergence."""


def form(name: str, statistic: str, dtype: str, case: str, device: str) -> Form | None:
    """A form of a statistic, or None where there is none."""
    if name == "naive32" and dtype == "float32":
        return None
    if (name == "chunked" and device != "cuda") or (name == "trl" and not find_spec("trl")):
        return None
    if name == "held" and (statistic != "logp" or case != "trained"):
        return None
    if statistic == "logp":
        return _logp(name, device)
    if name == "eager" and (statistic == "dackl" or case != "trained"):
        return None
    return _two(name, statistic)


def _logp(name: str, device: str) -> Form | None:
    def naive(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return (x @ weight.T).float().log_softmax(-1).gather(1, target[:, None]).squeeze(1)

    def naive32(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return naive(x.float(), weight.float(), target)

    def trl(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        return ChunkedLogProbFunction.apply(x, weight, None, target, 1.0, 32768, None, 1.0, ())[0]

    def liger(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        if device == "cuda":
            from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

            answer = LigerFusedLinearCrossEntropyFunction.apply(x, weight, target, None, None, -100, 0.0, 0.0, "none")
            return -(answer[0] if isinstance(answer, tuple) else answer)
        from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction

        return _ChunkedSelectiveLogProbFunction.apply(x, weight, target, None, 1.0, 4096)

    def cce(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        impl = "cce" if device == "cuda" else "torch_compile"
        return -linear_cross_entropy(x, weight, target, reduction="none", impl=impl)

    def ours(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        how = {"impl": "chunked" if name == "chunked" else "auto", "keep": 1 << 50 if name == "held" else 0}
        return head_stats(Head(x, weight), ["logp"], target=target, **how)["logp"]

    if (name == "liger" and not find_spec("liger_kernel")) or (name == "cce" and not find_spec("cut_cross_entropy")):
        return None
    return {
        "naive": naive,
        "naive32": naive32,
        "trl": trl,
        "liger": liger,
        "cce": cce,
        "ours": ours,
        "held": ours,
        "chunked": ours,
    }.get(name)


def adaptive(lp: Tensor, lq: Tensor) -> Tensor:
    """[n] AKL by its definition: forward and reverse KL, weighted by how far the models are apart on the teacher's head."""
    q = lq.exp()
    with torch.no_grad():
        ordered, order = q.sort(-1, descending=True)
        inside = ordered.cumsum(-1) - ordered < 0.5
        gap = (lp.exp() - q).abs_()
        share = (gap.gather(1, order) * inside).sum(-1) / gap.sum(-1)
    return share * (q * (lq - lp)).sum(-1) + (1 - share) * (lp.exp() * (lp - lq)).sum(-1)


def windowed(lp: Tensor, lq: Tensor) -> Tensor:
    """[n] DAC-KL with a fixed window, from the log-probs [n, k] of the teacher's likeliest items in both models."""
    gates = log_gates(lq, lq.new_tensor([[0.05, 0.95]]), 0.05)
    p, q = (lq + gates).log_softmax(-1), (lp + gates).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def objective_of(name: str, x: Tensor, weight: Tensor, x_teacher: Tensor, weight_teacher: Tensor, *, eager: bool) -> Tensor:
    """[N] the loss of an objective, by the statistics it asks for."""
    objective = find(name)
    want = objective.want(objective.config())
    want = [dataclasses.replace(entry, eager=eager) if isinstance(entry, Rowwise) else entry for entry in want]
    targets = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    found = statistics(Head(x, weight), want, targets=targets, ref=Head(x_teacher, weight_teacher))
    return found["akl"] if name == "akl" else windowed(found["top_logps"], found["top_reference_logps"])


def _two(name: str, statistic: str) -> Form | None:
    declared = None if statistic in ADAPTIVE else divergence({"jsd": "jsd:0.5"}.get(statistic, statistic))

    def naive(x: Tensor, weight: Tensor, x_teacher: Tensor, weight_teacher: Tensor) -> Tensor:
        lp = (x @ weight.T).float().log_softmax(-1)
        lq = (x_teacher @ weight_teacher.T).float().log_softmax(-1)
        if statistic == "dackl":
            likeliest, ids = lq.topk(64)
            return windowed(lp.gather(1, ids), likeliest)
        return adaptive(lp, lq) if declared is None else declared.summand(lp, lq).sum(-1)

    def naive32(*tensors: Tensor) -> Tensor:
        return naive(*(tensor.float() for tensor in tensors))

    def trl(x: Tensor, weight: Tensor, x_teacher: Tensor, weight_teacher: Tensor) -> Tensor:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        beta = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}[statistic]
        return ChunkedDivergenceFunction.apply(x, weight, None, x_teacher, weight_teacher, None, beta)[0]

    def liger(x: Tensor, weight: Tensor, x_teacher: Tensor, weight_teacher: Tensor) -> Tensor:
        """Liger gives the mean over tokens, with the gradients taken in its forward: each token gets that share of the sum."""
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        beta = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}[statistic]
        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=x.is_cuda, chunk_size=LIGER_CHUNK
        )
        target = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return loss(x, weight, x_teacher, weight_teacher, target).expand(len(x))

    def ours(x: Tensor, weight: Tensor, x_teacher: Tensor, weight_teacher: Tensor) -> Tensor:
        if declared is None:
            return objective_of(statistic, x, weight, x_teacher, weight_teacher, eager=name == "eager")
        entry = KLS.get(statistic) or Separable(statistic, declared.summand, declared.slope, (statistic, 0.5))
        how = {"eager": statistic if name == "eager" else None, "impl": "chunked" if name == "chunked" else "auto"}
        return head_stats(Head(x, weight), [entry], ref=Head(x_teacher, weight_teacher), **how)[statistic]

    there = {"naive": naive, "naive32": naive32, "ours": ours, "eager": ours}
    if statistic not in ADAPTIVE:
        there |= {"chunked": ours, "trl": trl} | ({"liger": liger} if find_spec("liger_kernel") else {})
    return there.get(name)


LIGER_CHUNK = 1024
"""Tokens, its default."""
