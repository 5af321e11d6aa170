"""The definition: every statistic from the full [N, V] logits by plain autograd. Small inputs, and the oracle of the tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .head import FLOOR, KLS, Head, Rowwise, Separable, Want, common


def logits(head: Head, size: int) -> Tensor:
    """[N, size] logits of the first `size` items, float32 or better."""
    z = torch.zeros((), dtype=head.dtype, device=head.x.device)
    for x, weight in head.terms:
        z = z + x.to(head.dtype) @ weight[:size].to(head.x.dtype).to(head.dtype).mT
    if head.bias is not None:
        z = z + head.bias[:size].to(head.dtype)
    z = z * head.scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    temperature = head.temperature
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().to(head.dtype).reshape(-1, 1)
    return z / temperature


def dense_stats(
    head: Head, want: Sequence[Want], *, target: Tensor | None, index: Tensor | None, ref: Head | None
) -> dict[str, Tensor]:
    """`head_stats` by definition: O(N V) memory."""
    z = logits(head, head.size)
    lp = z.log_softmax(-1)  # [N, V]
    out: dict[str, Tensor] = {}
    for entry in want:
        match entry:
            case "logp":
                out[entry] = lp.gather(1, target[:, None]).squeeze(1)
            case "lse":
                out[entry] = z.logsumexp(-1)
            case "entropy":
                out[entry] = -(lp.exp() * lp.clamp(min=FLOOR)).sum(-1)
            case "log_sum_p2":
                out[entry] = (2 * lp).logsumexp(-1)
            case "max_logp":
                out[entry] = lp.max(-1).values
            case "argmax":
                out[entry] = lp.argmax(-1)
            case "gather":
                out[entry] = lp.gather(1, index)
            case "ref_logp":
                with torch.no_grad():
                    out[entry] = logits(ref, ref.size).log_softmax(-1).gather(1, target[:, None]).squeeze(1).to(lp.dtype)
            case "ref_lse":
                with torch.no_grad():
                    out[entry] = logits(ref, ref.size).logsumexp(-1).to(lp.dtype)
            case Rowwise():
                out[entry.name], others = entry(*_both(z, ref, head), target)
                out |= others
            case _:
                divergence = entry if isinstance(entry, Separable) else KLS[entry]
                out[divergence.name] = divergence.f(*_both(z, ref, head)).sum(-1)
    return out


def _both(z: Tensor, ref: Head | None, head: Head) -> tuple[Tensor, Tensor | None]:
    """Log-probs of both heads over the common vocabulary; of the head alone without a ref."""
    if ref is None:
        return z.log_softmax(-1).clamp(min=FLOOR), None
    size = common(head, ref)
    with torch.no_grad():
        lq = logits(ref, size).log_softmax(-1).clamp(min=FLOOR).to(z.dtype)
    return z[:, :size].log_softmax(-1).clamp(min=FLOOR), lq


def dense_l1_cost(head: Head, ref: Head) -> Tensor:
    """`l1_cost` by definition: O(N M V) memory."""
    p, q = _probabilities(head, ref)
    return (p[:, None] - q).abs().sum(-1)


def dense_span_cost(head: Head, ref: Head, first: Tensor, second: Tensor) -> Tensor:
    """`span_cost` by definition: O(N V) memory."""
    p, q = _probabilities(head, ref)
    return (q[first] * q[second] - p[first] * p[second]).square().sum(-1)


def _probabilities(head: Head, ref: Head) -> tuple[Tensor, Tensor]:
    size = common(head, ref)
    with torch.no_grad():
        q = logits(ref, size).softmax(-1).to(head.dtype)
    return logits(head, size).softmax(-1), q
