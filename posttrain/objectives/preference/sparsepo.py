"""SparsePO: token-level DPO whose token rewards and token KLs are weighed by learned, sparse masks.

    loss = -log sigmoid(r_chosen - r_rejected) + sum over both completions of (l1_reward * |a|_1 + l1_kl * |b|_1)
    r = beta * (U + Q),   U = sum_t a_t * (log policy(y_t) - log reference(y_t)),   Q = sum_t b_t * KL(reference || policy) at t
    mask_t = act(sum_l v_l * act(w_l . LayerNorm(h_lt) + c_l)),   h_l: hidden states of the reference after layer l of L

The masks a (reward) and b (KL) come from one network (`common`; their L1 weights are then halved, so that their mean weighs
|a|_1) or from two (`independent`). |a|_1 = sum_t |a_t|, so it grows with the length. LayerNorm is affine and shared by the
layers, v has no bias. a = b = 1 is TDPO1. All is trained together, the masks with a learning rate and a weight decay of their
own; the exported model does not hold them. Rewards logged: r as it stands in the loss.

Masks are unbounded and start small (mean about 0.1), half of them 0: the effective beta is beta * mask. Where the policy equals
the reference U = Q = 0, so without L1 the first step moves the policy and not the masks. A mask that is 0 at every token has no
gradient and stays 0; it is reported. Hidden states of real models vary little between tokens, so that a network starts with
most tokens masked or with few: of 300 on states of SmolLM2-135M 9 % started at 0 for each of 51 tokens.

Source: Christopoulou et al. 2025 (Findings of EMNLP), arXiv:2410.05102; the formulas are those of the authors' code
(huawei-noah/HEBO, SparsePO), which has dropout in the networks, off by default, and none here. It logs beta * (U - Q), the KL
with the wrong sign, and takes no gradient through the minimum and maximum of `resc`.
Value at policy == reference: log 2 (without L1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from ...masks import rescaled
from ...registry import objective
from ...schema import NonNegative, Positive
from ...stats import Completions, Learned, Loss, Pairs, Sizes, States, reward_metrics

Activation = Literal["relu", "resc", "none"]


@dataclass(frozen=True, kw_only=True)
class SparsePOConfig:
    """Settings of SparsePO."""

    beta: Positive = 0.1
    """Pull to the reference, times the mask; larger keeps the policy nearer. The paper takes 0.1 to 0.8."""

    masks: Literal["common", "independent"] = "common"
    """One mask for rewards and KLs, or one for each."""

    mask_on_reward: bool = True
    """Whether rewards are masked; otherwise a = 1."""

    mask_on_kl: bool = True
    """Whether KLs are masked; otherwise b = 1."""

    l1_reward: NonNegative = 0.0
    """Weight of the L1 norm of the mask on rewards; the paper takes 0.001 on HH."""

    l1_kl: NonNegative = 0.0
    """Weight of the L1 norm of the mask on KLs."""

    layer_activation: Activation = "relu"
    """Of each layer's score: relu, resc (to [0, 1] by least and largest of the completion) or none."""

    mixer_activation: Activation = "relu"
    """Of their weighted sum, the mask: relu, resc or none; only relu makes a mask sparse."""

    mask_learning_rate: Positive | None = None
    """Learning rate of the mask networks; the run's when absent."""

    mask_weight_decay: NonNegative = 0.01
    """Weight decay of the mask networks."""

    def __post_init__(self) -> None:
        if not self.masked:
            raise ValueError("mask_on_reward and mask_on_kl are both false, which leaves nothing to mask; tdpo has no masks")
        for kind in ("reward", "kl"):
            if kind not in self.masked and vars(self)[f"l1_{kind}"]:
                raise ValueError(f"l1_{kind} weighs a mask that mask_on_{kind} = false switches off; leave it out")

    @property
    def masked(self) -> tuple[str, ...]:
        """What has a mask: reward, kl."""
        return tuple(kind for kind in ("reward", "kl") if vars(self)[f"mask_on_{kind}"])

    @property
    def networks(self) -> dict[str, tuple[str, ...]]:
        """Each network -> what its mask is on."""
        common = self.masks == "common" and len(self.masked) == 2
        return {"mask": self.masked} if common else {f"mask_{kind}": (kind,) for kind in self.masked}


def _start(config: SparsePOConfig, sizes: Sizes) -> dict[str, torch.Tensor]:
    """As torch starts linear layers (uniform within 1 / sqrt(inputs)) and LayerNorm."""
    layers, width = sizes.reference_layers, sizes.reference_hidden
    uniform = lambda inputs, *shape: (2 * torch.rand(shape) - 1) / math.sqrt(inputs)  # noqa: E731
    return {
        f"{network}_{name}": value
        for network in config.networks
        for name, value in {
            "w": uniform(width, layers, width),
            "c": uniform(width, layers),
            "v": uniform(layers, layers),
            "scale": torch.ones(width),
            "shift": torch.zeros(width),
        }.items()
    }


def _masks(config: SparsePOConfig, parameters: Mapping[str, torch.Tensor], tokens: Completions) -> dict[str, torch.Tensor]:
    """[N] the mask of each network."""
    states = tokens["reference_states"].detach()  # [N, L, H]
    found = {}
    for network in config.networks:
        w, c, v, scale, shift = (parameters[f"{network}_{name}"] for name in ("w", "c", "v", "scale", "shift"))
        normed = torch.nn.functional.layer_norm(states.to(w.dtype), scale.shape, eps=1e-5)  # [N, L, H]
        # The shared affine map goes to the side of the weights, so that only one [N, L, H] tensor is kept for the backward.
        scores = torch.einsum("nlh,lh->nl", normed, w * scale) + w @ shift + c  # [N, L]
        mixed = _activated(scores, config.layer_activation, tokens.lengths) @ v  # [N]
        found[network] = _activated(mixed, config.mixer_activation, tokens.lengths)
    return found


def _activated(values: torch.Tensor, activation: Activation, lengths: torch.Tensor) -> torch.Tensor:
    if activation == "relu":
        return values.relu()
    return rescaled(values, lengths) if activation == "resc" else values


def _dead(config: SparsePOConfig, metrics: Mapping[str, float]) -> list[str]:
    """A warning for each mask that was 0 at every token since the last log."""
    return [
        f"{network} is 0 at every token: it has no gradient, stays 0, and lets what it masks train nothing. If it started so, "
        "another train.seed starts it elsewhere; if it died, lower the l1 weights or mask_learning_rate; "
        "mixer_activation=resc cannot die"
        for network in config.networks
        if metrics.get(f"{network}/max") == 0 == metrics.get(f"{network}/min")
    ]


@objective(
    reference=True,
    want=("forward_kl", States()),
    start=lambda config: None if config.l1_reward or config.l1_kl else math.log(2),
    learned=Learned(
        start=_start,
        statistics=_masks,
        learning_rate=lambda config: config.mask_learning_rate,
        weight_decay=lambda config: config.mask_weight_decay,
    ),
    watch=_dead,
)
def sparsepo(config: SparsePOConfig, pairs: Pairs) -> Loss:
    rewards, l1, metrics = {}, 0.0, {}
    for side, one in (("chosen", pairs.chosen), ("rejected", pairs.rejected)):
        weights = dict.fromkeys(("reward", "kl"), torch.ones_like(one.logratios))  # [N]
        for network, kinds in config.networks.items():
            mask = one[network].to(one.logratios.dtype)
            weights |= dict.fromkeys(kinds, mask)
            norm = one.sum(mask.abs())  # [B]
            l1 = l1 + norm * sum(vars(config)[f"l1_{kind}"] for kind in kinds) / len(kinds)
            metrics |= {f"{network}/{side}": mask.detach(), f"{network}/zero/{side}": (mask.detach() == 0).float()}
            metrics |= {f"{network}/l1/{side}": norm.detach()}
        kl = one.sum(weights["kl"] * one["forward_kl"])  # [B]
        rewards[side] = config.beta * (one.sum(weights["reward"] * one.logratios) + kl)  # [B]
        metrics[f"kl/{side}"] = kl.detach()
    for network in config.networks:
        both = torch.cat([pairs.chosen[network], pairs.rejected[network]]).detach()
        metrics |= {f"{network}/min": both, f"{network}/max": both}
    losses = torch.nn.functional.softplus(rewards["rejected"] - rewards["chosen"]) + l1  # [B]
    return Loss(losses, {**reward_metrics(rewards["chosen"], rewards["rejected"]), **metrics})
