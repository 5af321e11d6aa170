"""INPO: each iterate regresses a pair's log-ratio onto who won, measured from the last iterate and, in part, the reference.

    loss = (h - c)^2,   c = 1 / (2 * eta)
    h = m(policy) - ratio * m(reference) - (1 - ratio) * m(previous),   m(p) = log p(chosen) - log p(rejected), sums over tokens
    soft labels: loss = p * (h - c)^2 + (1 - p) * (h + c)^2,   p = P(chosen is preferred to rejected)

ratio is tau / eta of the paper: 1 is IPO against the reference with beta = eta, 0 knows the last iterate alone. For pairs that
the last iterate wrote, labelled by the preference, the optimum of both losses is a step of online mirror descent,
policy ~ exp(P(y > previous) / eta) * reference^ratio * previous^(1 - ratio), and its fixed point the Nash policy of the game
regularised by tau; the best and the worst of 8, which is what is published, are not quite such pairs. The numbers of a row,
which `posttrain iterate` computes once an iteration: `previous_chosen` and `previous_rejected`, the last iterate's log-probs of
both completions, and `preference`, p.

With eta this small the target, 67 nats, is out of reach, so that the gradient is about -1 / eta a pair and hardly changes:
learning rate and max_grad_norm decide how far an iteration goes, and the loss says little; `inpo/h` does.

Rewards logged: eta * (log policy - ratio * log reference - (1 - ratio) * log previous), of which the loss wants a margin of
1/2; the authors' code logs eta * (log policy - log reference).

Source: Zhang et al. 2024, "Iterative Nash Policy Optimization: Aligning LLMs with General Preferences via No-Regret Learning",
arXiv:2407.00617, and the authors' code, whose default is eta 0.0075 with a ratio of 0; its script has 0.005 and 1/3. Soft
labels are ours: the expectation of the loss over who wins.
Value at policy == reference: it depends on the data; 1 / (4 * eta^2) in the first iteration, which starts at the reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ...registry import objective
from ...schema import Positive, Probability
from ...stats import Loss, Pairs, reward_metrics


@dataclass(frozen=True, kw_only=True)
class ContestedPairs(Pairs):
    """Pairs that the last iterate wrote, with its log-probs of them and how sure the preference is."""

    previous_chosen: torch.Tensor
    """[B] log previous(chosen | prompt), summed over tokens."""

    previous_rejected: torch.Tensor
    """[B] log previous(rejected | prompt), summed over tokens."""

    preference: torch.Tensor
    """[B] the probability that the chosen completion is preferred to the rejected one."""


@dataclass(frozen=True, kw_only=True)
class INPOConfig:
    """Settings of INPO."""

    eta: Positive = 0.0075
    """Inverse step of mirror descent: the h aimed at is 1 / (2 * eta)."""

    ratio: Probability = 1 / 3
    """tau / eta: the share of the reference in what h is measured from; the last iterate has the rest."""

    labels: Literal["hard", "soft"] = "hard"
    """hard: the chosen completion has won; soft: it has with the probability in `preference`."""


@objective(reference=True)
def inpo(config: INPOConfig, pairs: ContestedPairs) -> Loss:
    chosen, rejected = pairs.chosen.logp, pairs.rejected.logp  # [B]
    reference = pairs.chosen.reference_logp, pairs.rejected.reference_logp  # [B] each
    previous = [one.to(chosen.dtype) for one in (pairs.previous_chosen, pairs.previous_rejected)]  # [B] each
    kept, moved = config.ratio, 1 - config.ratio
    chosen = chosen - kept * reference[0] - moved * previous[0]  # [B]
    rejected = rejected - kept * reference[1] - moved * previous[1]  # [B]
    h, target = chosen - rejected, 1 / (2 * config.eta)
    won = pairs.preference.to(h.dtype)  # [B]
    losses = (h - target).square()  # [B]
    if config.labels == "soft":
        losses = won * losses + (1 - won) * (h + target).square()
    return Loss(
        losses,
        {
            **reward_metrics(config.eta * chosen, config.eta * rejected),
            "inpo/h": h.detach(),
            "inpo/margin_reference": reference[0] - reference[1],
            "inpo/margin_previous": previous[0] - previous[1],
            "inpo/preference": won,
        },
    )
