"""What every rollout engine takes and gives: prompts of token ids, and for each of them a group of rollouts.

Letters in shape comments: T tokens of a completion.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..schema import UserError
from ..settings import SamplingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_log = logging.getLogger("posttrain")

_WARN, _STOP = 1.05, 1.5


@dataclass(frozen=True)
class Rollout:
    """One sampled completion."""

    prompt: list[int]
    """Token ids that it continues."""

    completion: list[int]
    """Sampled token ids, through the end token if it has one; none where its text begins with a stop string."""

    logps: list[float] | None
    """[T] the engine's own log-probs of the completion's tokens, in nats, under the distribution that was sampled from: at its
    temperature and, if tokens were left out, renormalised over those that remained. None where the engine knows none."""

    finished: bool
    """Whether it came to its end, a token or a stop string, and not to the limit of tokens."""

    group: int
    """Position of its prompt among those of the call."""

    version: int
    """Version of the weights that sampled it."""


class Engine(Protocol):
    """What samples rollouts."""

    def generate(self, prompts: Sequence[Sequence[int]], n: int = 1, *, seeds: Sequence[int] | None = None) -> list[Rollout]:
        """n rollouts of each prompt, prompt after prompt.

        Args:
            prompts: token ids, none of them empty.
            n: rollouts of each.
            seeds: one number per prompt, from which its rollouts' randomness comes; by default derived from the seed of the
                settings, the version of the weights and the prompt's position. So the same call twice gives the same rollouts;
                who wants others of the same prompts gives seeds.

        Raises:
            UserError: a prompt that the model cannot continue, or an engine that cannot be reached.
        """
        ...

    def sync(self, version: int) -> None:
        """Sample from the weights of `version` from now on; does nothing if it samples from them already."""
        ...

    def close(self) -> None:
        """Give back memory, processes and connections. More than once is allowed."""
        ...


def derived(*numbers: int) -> int:
    """A 63-bit number that is as good as random and fixed by `numbers` (all >= 0): a seed for one of many streams."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seeds_for(
    sampling: SamplingConfig, version: int, prompts: Sequence[Sequence[int]], given: Sequence[int] | None
) -> list[int]:
    """The seeds of a call of `generate`: those given, or one per prompt from settings, version and position."""
    if given is None:
        return [derived(sampling.seed, version, position) for position in range(len(prompts))]
    assert len(given) == len(prompts), (len(given), len(prompts))
    return list(given)


def text_of(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> str:
    """A completion as the text that it adds to its prompt, without special tokens; a leading space is kept."""
    return text_after(rollout.prompt, rollout.completion, tokenizer)


def text_after(prompt: Sequence[int], tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that tokens add to a prompt; see `text_of`."""
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    both = tokenizer.decode([*prompt, *tokens], skip_special_tokens=True)
    if both.startswith(before):
        return both[len(before) :]
    return tokenizer.decode(tokens, skip_special_tokens=True)


def cut(tokens: Sequence[int], ends: Iterable[int]) -> tuple[list[int], bool]:
    """Sampled tokens through the first end token, and whether there is one."""
    ends = frozenset(ends)
    at = next((i for i, token in enumerate(tokens) if token in ends), None)
    return (list(tokens), False) if at is None else (list(tokens[: at + 1]), True)


def refuse_prompts(prompts: Sequence[Sequence[int]], sampling: SamplingConfig, positions: int | None, where: str) -> None:
    """Every prompt can be continued by as many tokens as are asked for.

    Args:
        prompts: token ids.
        sampling: the settings.
        positions: tokens that the model can read; None: no limit is known.
        where: how errors call the engine.

    Raises:
        UserError: an empty prompt, or one too long.
    """
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise UserError(f"{where}: prompt {number} of {len(prompts)} is empty; a completion needs something to continue")
        if positions is not None and len(prompt) + sampling.max_new_tokens > positions:
            raise UserError(
                f"{where}: prompt {number} of {len(prompts)} has {len(prompt)} tokens, which with max_new_tokens = "
                f"{sampling.max_new_tokens} is more than the model's {positions} positions; shorten one of them"
            )


def probe(rollouts: Sequence[Rollout], trainer: Sequence[Sequence[float]], where: str) -> float:
    """How far the engine's log-probs are from the trainer's on the same tokens: the mean of exp|difference|.

    Made after weights were brought over, it finds those that were not: 1 is exact, above 1.05 it warns, above 1.5 it stops.

    Args:
        rollouts: with log-probs of the engine.
        trainer: [T] the trainer's log-probs of each, at the engine's temperature.
        where: how messages call the engine.

    Raises:
        UserError: engine and trainer cannot have the same weights.
    """
    pairs = [pair for one, ours in zip(rollouts, trainer, strict=True) for pair in zip(one.logps or (), ours, strict=True)]
    gap = sum(math.exp(abs(theirs - ours)) for theirs, ours in pairs) / len(pairs)
    judge(gap, where)
    return gap


def judge(gap: float, where: str) -> None:
    """Warn or stop where an engine's log-probs are off the trainer's by a factor of `gap` a token; see `probe`.

    Raises:
        UserError: engine and trainer cannot have the same weights.
    """
    said = f"{where}: its log-probs are off the trainer's by a factor of {gap:.3g} a token"
    if gap > _STOP or math.isnan(gap):
        raise UserError(f"{said}; it samples from other weights, or otherwise than it says (1 is exact, {_STOP} is the limit)")
    if gap > _WARN:
        _log.warning("%s (1 is exact, below %s is usual): lower precision, or stale weights", said, _WARN)


def truncation_warning(sampling: SamplingConfig) -> str | None:
    """What leaving tokens out does to off-policy corrections; None where none is left out."""
    if not sampling.truncated:
        return None
    asked = [("top_p", sampling.top_p, 1.0), ("top_k", sampling.top_k, 0), ("min_p", sampling.min_p, 0.0)]
    named = ", ".join(f"{name} = {value:g}" for name, value, off in asked if value != off)
    return (
        f"sampling: {named} samples from a truncated, renormalised distribution. Importance weights policy / rollout are then "
        "biased: each is too small by the factor of the kept probability, and tokens that were cut off are never "
        "corrected for; temperature alone has no such bias"
    )
