"""How far best-of-n is from the policy that it samples from: the bound, an estimate from samples, and what is exact.

    P_n(y) = F(y)^n - F(y-)^n                                    F: reference's distribution function in the order of the reward
    KL(P_n || reference) <= log n - (n - 1) / n                  equal where no single completion has a probability to speak of
    KL is about the mean over y ~ P_n, with e = reference(y), of
        (1 - e)^n (log n + (n - 1) log(1 - e) - (n - 1) / n) + (1 - (1 - e)^n) log((1 - (1 - e)^n) / e)

The bound grows without end, the KL does not where there are few completions: two equally likely ones have log 2 for n = 128,
and a bound of 3.86. The estimate lies between the two and needs log-probs of the reference alone.

Source: Beirami et al. 2024, "Theoretical guarantees on the best-of-n alignment policy", arXiv:2401.01879.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def kl_bound(n: int) -> float:
    """The upper bound on the KL of best-of-n to its reference, in nats."""
    return math.log(n) - (n - 1) / n


def win_rate_bound(n: int) -> float:
    """How often best-of-n beats one sample, at most: reached where no two completions tie."""
    return n / (n + 1)


def kl_estimates(logps: torch.Tensor, n: int) -> torch.Tensor:
    """What each sample of best-of-n says of its KL to the reference; their mean is the estimate.

    Args:
        logps: [B] log reference(y) of the whole completion y that was chosen among n; 0 is certainty.
        n: completions that it was chosen from.

    Returns:
        [B] in nats, float64.
    """
    logps = logps.double()
    e = logps.exp()
    rest = torch.log1p(-e)  # [B] log(1 - e), -inf where y is certain
    none = (n * rest).exp()  # [B] (1 - e)^n, the probability that n samples have no y
    some = -torch.expm1(n * rest)  # [B] 1 - (1 - e)^n, exact also where e is tiny
    # log(some / e): both underflow together below e^-745, where their ratio is n.
    ratio = torch.where(e > 0, some / e.clamp(min=torch.finfo(torch.float64).tiny), n).log()
    others = torch.where(none > 0, none * (math.log(n) + (n - 1) * rest - (n - 1) / n), 0)
    return others + some * ratio


def distribution(probabilities: Sequence[float], rewards: Sequence[float], n: int) -> torch.Tensor:
    """[V] float64, the distribution of best-of-n over V outcomes with different rewards."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    order = torch.tensor(rewards, dtype=torch.float64).argsort()
    upto = p[order].cumsum(0).clamp(max=1)
    chosen = torch.empty_like(p)
    chosen[order] = upto**n - torch.nn.functional.pad(upto[:-1], (1, 0)) ** n
    return chosen
