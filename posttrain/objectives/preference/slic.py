"""SLiC-HF: a hinge on the log-probs of a pair, without a reference, plus the NLL of the chosen completion.

    loss = max(0, delta - log policy(y_chosen) + log policy(y_rejected)) - lam * log policy(y_chosen)

Log-probs are sums over tokens. The second term keeps the policy near supervised fine-tuning; its target is the chosen
completion (the paper allows another one). Rewards logged: log policy(y), as it stands in the hinge; `hinge/satisfied` is the
share of pairs that only the second term still moves.

Source: Zhao et al. 2023, "SLiC-HF: Sequence Likelihood Calibration with Human Feedback", arXiv:2305.10425; defaults of HALOs,
whose code is not followed: it adds the NLL of tokens to hinges of sequences. With a reference: `hinge`.
Value at policy == reference: depends on the data.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...registry import objective
from ...schema import NonNegative, Positive
from ...stats import Loss, Pairs, reward_metrics


@dataclass(frozen=True, kw_only=True)
class SLiCConfig:
    """Settings of SLiC-HF."""

    delta: Positive = 1.0
    """Margin of log-probs (in nats) at which a pair is left alone."""

    lam: NonNegative = 0.1
    """Weight of the NLL of the chosen completion, summed over its tokens."""


@objective(reference=False)
def slic(config: SLiCConfig, pairs: Pairs) -> Loss:
    chosen, rejected = pairs.chosen.logp, pairs.rejected.logp  # [B]
    hinges = (config.delta - chosen + rejected).relu()  # [B]
    satisfied = (hinges.detach() == 0).to(hinges.dtype)
    return Loss(hinges - config.lam * chosen, {**reward_metrics(chosen, rejected), "hinge/satisfied": satisfied})
