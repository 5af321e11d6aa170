"""What a policy wrote, what became of it, and what is to be learned from it: between a round of rollouts and the losses.

An online objective has two pure functions. Its `lesson` sees all completions of a round at once, before any update, as an
`Experience`: scores, log-probs, values; it says as a `Lesson` which completions are learned from and fixes the numbers of
each token that do not change while they are, such as advantages. Its loss then sees them, a micro-batch at a time, as a family.

Letters in shape comments: B completions, G after each prompt, prompt after prompt; N tokens of all of them, end to end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from .stats import Completions


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """B completions that the policy wrote, and what the lesson says of their tokens: the family of policy optimisation."""

    completion: Completions
    """The completions."""

    advantages: torch.Tensor = field(metadata={"per": "token"})
    """[N] how much better than expected, whatever the lesson makes of that."""

    old_logps: torch.Tensor = field(metadata={"per": "token"})
    """[N] the trainer's log-probs when the round was sampled."""

    weights: torch.Tensor = field(metadata={"per": "token"})
    """[N] what a token counts: it corrects for an engine that samples otherwise than the trainer says; 1 where nothing does."""

    penalties: torch.Tensor = field(metadata={"per": "token"})
    """[N] weight of |log policy - old log-prob|, which holds a token where it was; 0 where nothing does."""

    old_values: torch.Tensor = field(metadata={"per": "token"})
    """[N] the critic's values when the round was sampled; 0 without one."""

    returns: torch.Tensor = field(metadata={"per": "token"})
    """[N] what the critic is to predict; 0 without one."""

    context: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """As in `Pairs`."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """B completions that the policy wrote and the lesson kept: the family of supervised passes over one's own best."""

    completion: Completions
    """The completions."""

    context: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """As in `Pairs`."""


def token_columns_of(family: type) -> list[str]:
    """The numbers a family takes for each token from the lesson: its fields with `per` token in their metadata, in order."""
    return [one.name for one in dataclasses.fields(family) if one.metadata.get("per") == "token"]


@dataclass(frozen=True, kw_only=True)
class Experience:
    """All completions of one round on this process, none of them learned from yet. Nothing has a gradient."""

    scores: torch.Tensor
    """[B] what the reward says of each completion."""

    lengths: torch.Tensor
    """[B] tokens of each completion, 0 where a stop string came first; sums to N."""

    group: int
    """G; the completions of one prompt stand together."""

    finished: torch.Tensor
    """[B] bool, whether it came to its end, and not to the limit of tokens."""

    old_logps: torch.Tensor
    """[N] the trainer's log-probs."""

    engine_logps: torch.Tensor | None = None
    """[N] those of the engine that sampled; None where it knows none."""

    reference_logps: torch.Tensor | None = None
    """[N] those of the reference; None where the objective reads none."""

    more: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """[N] each: what else the objective asked for in `want`, as it was when the round was sampled, and what its own parameters
    say (a critic's `values`)."""

    context: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """As in `Pairs`."""

    total: Callable[[torch.Tensor], torch.Tensor] = lambda values: values
    """The sum of a tensor over all processes. Every process calls it equally often with equal shapes, rows or none."""

    @property
    def completion(self) -> Completions:
        """The completions with the trainer's log-probs, for sums and means over the tokens of each."""
        return Completions(logps=self.old_logps, lengths=self.lengths, reference_logps=self.reference_logps)


class _Empty(dict):
    """An empty tensor under every name."""

    def __missing__(self, name: str) -> torch.Tensor:
        return torch.empty(0)


def nothing(group: int, context: Mapping[str, float]) -> Experience:
    """An experience without completions, from which a lesson can say what is wrong with settings before anything is sampled.

    Args:
        group: G.
        context: what the objective reads beside its rows.
    """
    numbers, none = torch.empty(0), torch.empty(0, dtype=torch.int64)
    return Experience(
        scores=numbers,
        lengths=none,
        group=group,
        finished=torch.empty(0, dtype=torch.bool),
        old_logps=numbers,
        engine_logps=numbers,
        reference_logps=numbers,
        more=_Empty(),
        context={name: torch.tensor(value) for name, value in context.items()},
    )


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What is learned from a round."""

    keep: torch.Tensor
    """[B] bool, the completions that are learned from."""

    tokens: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """[N] each, of all completions, kept or not: the token columns of the objective's family, by name."""

    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """As `Loss.metrics`, of the round."""

    remember: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """As `Loss.remember`, of the round."""
