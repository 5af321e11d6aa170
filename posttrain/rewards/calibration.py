"""Scores on the scale of the reference: how much of what the reference writes to the same prompt a completion is better than.

    c = mean over the reference's completions of [score > theirs] + [score = theirs] / 2           in [0, 1]
    best-of-n:  exp(t c), t > 0        worst-of-n:  -exp(t c), t < 0        win rate:  c

Maximising the transformed reward under a KL makes a policy good after one of several of its completions is chosen.

Source: Balashankar et al. 2024, "InfAlign: Inference-aware language model alignment" (InfAlign-CTRL), arXiv:2412.19792.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence


def calibrated(scores: Sequence[float], reference: Sequence[float]) -> list[float]:
    """For each score of a prompt's completions its place among those of the reference's completions, in [0, 1].

    Args:
        scores: of the policy's completions.
        reference: of the reference's completions of the same prompt, at least one.
    """
    ordered = sorted(reference)
    return [(bisect.bisect_left(ordered, one) + bisect.bisect_right(ordered, one)) / (2 * len(ordered)) for one in scores]


def tilted(places: Sequence[float], t: float) -> list[float]:
    """Calibrated scores for an inference that chooses among completions: the best (t > 0, 10 is usual) or the worst (t < 0)."""
    return [math.copysign(math.exp(t * place), t) for place in places]
