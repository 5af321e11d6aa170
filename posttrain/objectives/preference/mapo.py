"""MaPO: token-level DPO whose token rewards and token KLs are weighed by a fixed mask, the reference's activations.

    loss = -log sigmoid(r_chosen - r_rejected),   r = beta * (U + Q)
    U = sum_t m_t * (log policy(y_t) - log reference(y_t)),   Q = sum_t m_t * KL(reference || policy) at t
    m_t = mean over kinds k of the mean over layers l of rescale(mean over features of the activation of k in layer l at t)

rescale brings the values of a completion's tokens to [0, 1] by the least and the largest; where all are equal, as in a
completion of one token, it is 1 and masks nothing. Kinds: what the MLP, the attention and the layer itself put out, and the
output head (one layer) before any soft-cap. The mask has no parameters and no gradient. Each activation gives 0 to one token of
a completion, so a mean over many is dense. Rewards logged: r as it stands in the loss.

Source: Christopoulou et al. 2025 (Findings of EMNLP), arXiv:2410.05102, the variant with a model-based mask; the formulas are
those of the authors' code (huawei-noah/HEBO, SparsePO). It takes z-scores before the rescaling, which then changes nothing;
rounds to float16; divides by 0 where all activations are equal; hooks further tensors inside of attention and MLP (queries,
keys, gates); and logs beta * (U - Q), the KL with the wrong sign.
Value at policy == reference: log 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import MinLen

from ...masks import rescaled
from ...registry import objective
from ...schema import Positive
from ...stats import Activations, Completions, Loss, Pairs, reward_metrics

Kind = Literal["mlp", "attention", "residual", "logits"]


@dataclass(frozen=True, kw_only=True)
class MaPOConfig:
    """Settings of MaPO."""

    beta: Positive = 0.1
    """Pull to the reference; larger keeps the policy nearer."""

    activations: Annotated[tuple[Kind, ...], MinLen(1)] = ("mlp", "attention", "residual", "logits")
    """Whose activations make the mask, each kind with the same weight."""


@objective(
    reference=True,
    want=lambda config: ("forward_kl", *(Activations(of=kind) for kind in config.activations)),
    start=math.log(2),
)
def mapo(config: MaPOConfig, pairs: Pairs) -> Loss:
    rewards, metrics = [], {}
    for side, one in (("chosen", pairs.chosen), ("rejected", pairs.rejected)):
        mask = _mask(config, one)  # [N]
        kl = one.sum(mask * one["forward_kl"])  # [B]
        rewards.append(config.beta * (one.sum(mask * one.logratios) + kl))  # [B]
        metrics |= {f"mask/{side}": mask, f"kl/{side}": kl.detach()}
    chosen, rejected = rewards
    return Loss(torch.nn.functional.softplus(rejected - chosen), {**reward_metrics(chosen, rejected), **metrics})


def _mask(config: MaPOConfig, tokens: Completions) -> torch.Tensor:
    """[N] without gradient."""
    found = []
    for kind in config.activations:
        values = tokens[f"reference_{kind}"].detach()  # [N, L]
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        found.append(rescaled(values, tokens.lengths).mean(1))
    return torch.stack(found).mean(0)
