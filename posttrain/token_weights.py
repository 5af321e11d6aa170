"""Which tokens policy optimisation counts less, so that the policy's entropy does not collapse.

STEER weighs a token by how much its update changes the entropy, to first order:

    Omega = A / old * policy (1 - policy) (log policy + H),   weight = e^(-k |Omega|),   least weight at the largest |Omega|

Clip-Cov and KL-Cov look at how advantage and log-prob of a token vary together, (A - mean A) (log policy - mean log policy):
what is large there is what makes the policy surer. Clip-Cov leaves some of the tokens within two bounds out of the loss; KL-Cov
adds |log policy - log old| to the loss of the share of tokens where it is largest, in place of a clip.

AEnt rewards the entropy of the policy without its least likely items, with a weight that keeps it between two bounds.

Maxima, means and shares are over all tokens of a round on all processes, not over a micro-batch as in the authors' codes, so
that nothing depends on how a round is split. No weight has a gradient.

Source: STEER: Hao et al. 2025, arXiv:2510.10150. Clip-Cov, KL-Cov: Cui et al. 2025, "The entropy mechanism of reinforcement
learning for reasoning language models", arXiv:2505.22617. AEnt: Shen 2025, arXiv:2509.03493. All with their authors' code.

Letters in shape comments: N tokens of the round on this process.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

import torch

Total = Callable[["torch.Tensor"], "torch.Tensor"]
"""The sum of a tensor over all processes."""

_SIGN = -(2**63)
_REST = 2**63 - 1


def _ordered(values: torch.Tensor) -> torch.Tensor:
    """[N] int64 in the order of the values."""
    bits = values.double().view(torch.int64)
    return torch.where(bits < 0, bits ^ _REST, bits)


def _reached(ordered: torch.Tensor, count: float, total: Total, low: int) -> int:
    """The largest number from `low` on that at least `count` of the entries of all processes are not below; else `low`."""
    high = _REST
    while low < high:
        middle = (low + high + 1) // 2
        enough = total((ordered >= middle).sum().double()).item() >= count
        low, high = (middle, high) if enough else (low, middle - 1)
    return low


def largest(values: torch.Tensor, total: Total) -> float:
    """The largest of the values [N] of all processes; 0 where there are none."""
    found = _reached(_ordered(values), 1, total, _SIGN)
    return 0.0 if found == _SIGN else struct.unpack("d", struct.pack("q", found if found >= 0 else found ^ _REST))[0]


def top(values: torch.Tensor, count: int, total: Total) -> torch.Tensor:
    """[N] bool: the `count` largest of the values of all processes, and those that equal the last of them."""
    ordered = _ordered(values)
    return ordered >= _reached(ordered, count, total, _SIGN)


def entropy_change(
    advantages: torch.Tensor, logps: torch.Tensor, old_logps: torch.Tensor, entropy: torch.Tensor
) -> torch.Tensor:
    """[N] Omega, what a token's update does to the entropy at its place."""
    return advantages * (logps - old_logps).exp() * -torch.expm1(logps) * (logps + entropy)


def steer(change: torch.Tensor, least: float, total: Total, *, most: float | None = None) -> torch.Tensor:
    """[N] the weight of each token, 1 where its update changes no entropy, `least` where it changes most.

    Args:
        change: [N] Omega.
        least: between 0 and 1.
        most: the authors' linear form instead, from `most` where it changes least down to `least`.
    """
    size = change.detach().abs()
    limit = largest(size, total)
    if most is not None:
        first = -largest(-size, total)
        return most - (most - least) * (size - first) / max(limit - first, 1e-8)
    return (math.log(least) / max(limit, 0.02) * size).exp()


def covariance(advantages: torch.Tensor, logps: torch.Tensor, total: Total) -> torch.Tensor:
    """[N] the product of what advantage and log-prob of a token are above their means."""
    sides = torch.stack([advantages, logps]).detach().double()  # [2, N]
    count = total(sides.new_tensor(sides.shape[1])).clamp(min=1)
    mean = total(sides.sum(1)) / count
    return (sides - mean[:, None]).prod(0)


def kl_cov(cov: torch.Tensor, share: float, total: Total) -> torch.Tensor:
    """[N] bool: the tokens to hold, the share of all that varies together most, one at least."""
    count = int(total(cov.new_tensor(cov.numel())).item() * share)
    return top(cov, max(count, 1), total)


def clip_cov(
    cov: torch.Tensor, share: float, low: float, high: float, total: Total, clipped: torch.Tensor | None = None
) -> torch.Tensor:
    """[N] bool: the tokens to leave out, as many as this share of all, drawn from those strictly within the bounds.

    The draw follows from the last digits of the covariances: a resumed run draws the same, and processes need no common seed.

    Args:
        clipped: [N] bool, tokens that are clipped already, which are not drawn.
    """
    inside = (cov > low) & (cov < high)
    if clipped is not None:
        inside &= ~clipped
    count = max(int(total(cov.new_tensor(cov.numel())).item() * share), 1)
    lots = torch.frac(cov * 12345.678910111213).abs()  # the digits that say nothing of how large it is
    return top(torch.where(inside, lots, -1.0), count, total) & inside


def kept_entropy(logps: torch.Tensor, share: float) -> torch.Tensor:
    """[n, V] log-probs -> [n] the entropy after the int(share * V) least likely items are left out and the rest renormalised.

    Which items are left out is a constant of the differentiation.
    """
    dropped = int(share * logps.shape[-1])
    if dropped:
        bound = logps.detach().kthvalue(dropped, dim=-1, keepdim=True).values
        logps = logps.masked_fill(logps.detach() <= bound, -math.inf)
    kept = logps.log_softmax(-1)
    return -(kept.exp() * kept.masked_fill(kept.detach().isinf(), 0)).sum(-1)


def entropy_weight(weight: float, entropy: float, *, low: float, high: float, rate: float, box: tuple[float, float]) -> float:
    """The weight of the entropy after a step: larger where the entropy was below `low`, smaller where it was above `high`.

    Args:
        rate: by how much a nat too few or too many changes it.
        box: what it stays within.
    """
    moved = weight - rate * (min(0.0, entropy - low) + max(0.0, entropy - high))
    return min(max(moved, box[0]), box[1])
