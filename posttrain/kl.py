"""KL(policy || reference) from sampled tokens: estimates of it, where they go, and a weight that adapts.

With d = log policy(y_t) - log reference(y_t) of a token that the policy wrote:

    k1 = d        k2 = d^2 / 2        k3 = e^-d - 1 + d        abs = |d|

k1 and k3 have the KL at this token as their mean, k3 without ever being negative; k2 and abs do not. What a term moves is not
the gradient of what it is on average, since the policy also writes the tokens that it is averaged over:

    where              estimate       expected gradient, of the KL at one token      of the KL of whole completions
    in the reward      k1             reverse KL                                     exact
    reward and loss    analytic       reverse KL                                     exact
    in the loss        analytic       reverse KL                                     without what a token does to later ones
    in the loss        k2, ratio_k3   as analytic, from the sampled token alone      as analytic
    in the loss        k3 (GRPO)      FORWARD KL(reference || policy)                neither
    in the loss        k1             0
    in the reward      k2, k3         neither

`analytic` is the sum over the vocabulary at each token the policy came to. In the reward it stands for the KL of later tokens,
and the loss beside it for that of the token itself. `ratio_k3` is k3 times policy / old policy, differentiated through both.

Source: Schulman 2020, "Approximating KL divergence" (estimates); Ziegler et al. 2019, arXiv:1909.08593 (in the reward, adaptive
weight); Shao et al. 2024, arXiv:2402.03300, eq. 4 (k3 in the loss); DeepSeek-AI 2025, "DeepSeek-V3.2" (ratio_k3); Amini et al.
2025, arXiv:2504.10637 (analytic). The table is derived by enumeration, and agrees with "A comedy of estimators", 2025,
arXiv:2512.21852.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from .importance import power

ESTIMATES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "k1": lambda d: d,
    "k2": lambda d: d.square() / 2,
    "k3": lambda d: power(-d, minus_one=True) + d,
    "abs": lambda d: d.abs(),
}
"""Name -> estimate of KL(policy || reference) from d, elementwise. k3 is continued linearly beyond |d| = 20, as `power` is."""

IN_LOSS: Mapping[str, str] = {
    "analytic": "reverse KL at each token",
    "k2": "reverse KL at each token",
    "ratio_k3": "reverse KL at each token",
    "k3": "forward KL at each token",
}
"""What goes into the loss -> the gradient that it has on average over the policy's tokens."""

REFUSED_IN_LOSS = "k1 in the loss has no gradient on average; in the reward it has that of the KL"


def in_loss(estimate: str, d: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
    """[N] the term of each token to be differentiated, of a name in `IN_LOSS` but `analytic`.

    Args:
        d: [N] log policy - log reference, with gradient.
        ratio: [N] policy / old policy, with gradient.
    """
    return ratio * ESTIMATES["k3"](d) if estimate == "ratio_k3" else ESTIMATES[estimate](d)


def adapted(weight: float, kl: float, *, target: float, horizon: float, episodes: float) -> float:
    """The weight of the KL after a round, larger where the KL was above its target.

    Args:
        weight: before.
        kl: mean over completions of log policy - log reference, summed over tokens.
        target: what it should be.
        horizon: completions after which an error of 20% or more has changed the weight by the factor 1.2.
        episodes: completions in the round.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return weight * (1 + error * episodes / horizon)


def sampled_kl(d: torch.Tensor) -> dict[str, torch.Tensor]:
    """[N] each: the two unbiased estimates, for metrics."""
    d = d.detach()
    return {f"kl/{name}": ESTIMATES[name](d) for name in ("k1", "k3")}
