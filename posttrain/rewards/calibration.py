"""Scores on the scale of the reference: how much of what the reference writes to the same prompt a completion is better than.

    c = mean over the reference's completions of [score > theirs] + [score = theirs] / 2           in [0, 1]
    best-of-n:  exp(t c), t > 0        worst-of-n:  -exp(t c), t < 0        win rate:  c

Maximising the transformed reward under a KL makes a policy good after one of several of its completions is chosen.

The reference's completions are sampled once: `posttrain sample --model BASE --data prompts.jsonl --n 16 --output base.jsonl`.

Source: Balashankar et al. 2024, "InfAlign: Inference-aware language model alignment" (InfAlign-CTRL), arXiv:2412.19792.
"""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..conversations import Text
from ..schema import UserError
from .scorer import Row, Scorer


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


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """The score of another scorer, calibrated on the reference's completions of the same prompt and tilted (InfAlign)."""

    of: dict[str, Any]
    """The other scorer: {name, and its settings}."""

    samples: str
    """File of posttrain sample: the reference's completions of the prompts, with the same data settings."""

    t: float | None = None
    """10 for best-of-n, -10 for worst-of-n; None leaves the calibrated score, the win rate against the reference."""

    def __post_init__(self) -> None:
        if self.t == 0:
            raise ValueError("t = 0 makes all completions equal; leave it out for the win rate")

    @cached_property
    def lines(self) -> dict[str, list[str]]:
        """The reference's completions by prompt.

        Raises:
            UserError: there is no such file, or it is not one of posttrain sample.
        """
        path = Path(self.samples)
        if not path.is_file():
            raise UserError(f"reward.samples: file {path} does not exist (posttrain sample writes it)")
        try:
            read = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            return {_key(line["asked"]): line["completions"] for line in read}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"reward.samples: {path} is no file of posttrain sample: {type(error).__name__} {error}") from None

    @cached_property
    def known(self) -> dict[str, list[float]]:
        """The scores of the reference's completions, by prompt, as far as they were needed."""
        return {}

    def score(self, of: Scorer, prompts: Sequence[Text], completions: Sequence[str], rows: Sequence[Row]) -> list[float]:
        """[rows] calibrated scores, where `of` is the other scorer.

        Raises:
            UserError: a prompt that the file does not have.
        """
        keys = [_key(prompt) for prompt in prompts]
        for key, prompt, row in zip(keys, prompts, rows, strict=True):
            if key not in self.lines:
                raise UserError(f"reward.samples: {self.samples} has no completions of the prompt {prompt!r:.100}")
            if key not in self.known:
                theirs = self.lines[key]
                self.known[key] = of([prompt] * len(theirs), theirs, [row] * len(theirs))
        scores = of(prompts, completions, rows)
        places = [calibrated([score], self.known[key])[0] for score, key in zip(scores, keys, strict=True)]
        return places if self.t is None else tilted(places, self.t)


def _key(prompt: Any) -> str:
    return json.dumps(prompt, sort_keys=True)
