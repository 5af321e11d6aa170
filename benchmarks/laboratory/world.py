"""A world small enough to enumerate: every response of a tiny language model, its reward, and every preference between two."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from posttrain_kernels import Head
from torch import Tensor

from posttrain import vocabulary
from posttrain.stats import Completions, Labelled, Want, columns_of, early_roles_of, roles_of


@dataclass(frozen=True)
class Language:
    """All responses of at most `length` tokens over `size` tokens, of which token 0 ends a response.

    Shapes: n responses, T tokens of all responses end to end, K prefixes that a token can follow.
    """

    size: int
    length: int

    @cached_property
    def responses(self) -> list[tuple[int, ...]]:
        """[n] in order; a response ends with token 0 or has the full length."""
        sequences = itertools.product(range(self.size), repeat=self.length)
        return sorted({tuple(s[: s.index(0) + 1]) if 0 in s else s for s in sequences})

    @cached_property
    def lengths(self) -> Tensor:
        """[n] tokens of each response."""
        return torch.tensor([len(response) for response in self.responses])

    @cached_property
    def prefixes(self) -> list[tuple[int, ...]]:
        """[K] from the empty one on, each after those it continues."""
        return sorted({response[:t] for response in self.responses for t in range(len(response))}, key=lambda s: (len(s), s))

    @cached_property
    def prefix(self) -> Tensor:
        """[T] the number of the prefix before each token."""
        number = {prefix: k for k, prefix in enumerate(self.prefixes)}
        return torch.tensor([number[response[:t]] for response in self.responses for t in range(len(response))])

    @cached_property
    def token(self) -> Tensor:
        """[T] the tokens."""
        return torch.tensor([token for response in self.responses for token in response])


@dataclass(frozen=True)
class Rows:
    """Some responses, any number of times, out of all responses to all prompts."""

    number: Tensor
    """[B] prompt * n + response."""

    lengths: Tensor
    """[B] tokens of each."""

    tokens: Tensor
    """[N] the numbers of their tokens among all."""

    def of(self, whole: Completions) -> Completions:
        """Their statistics, out of those of all responses to all prompts."""
        more = {name: values[self.tokens] for name, values in whole.more.items()}
        reference_logps = whole.reference_logps[self.tokens]
        return Completions(logps=whole.logps[self.tokens], lengths=self.lengths, reference_logps=reference_logps, more=more)


@dataclass(frozen=True)
class World:
    """P prompts, a reference, a reward, and how often one response is preferred to another.

    A model is a table of logits, one row for every prefix of every prompt, so that it can be any distribution over responses.
    Both responses of a pair are drawn from the reference, or from another author, and responses are labelled by such pairs.
    """

    language: Language

    reference: Tensor
    """[P * K, V] float64 logits; prefix k of prompt x is row x * K + k."""

    reward: Tensor
    """[P, n] the reward of every response."""

    preference: Tensor
    """[P, n, n] the probability that the first response is preferred to the second."""

    author: Tensor | None = None
    """[P * K, V] logits of who draws the responses in place of the reference: the last iterate."""

    @property
    def prompts(self) -> int:
        return len(self.reward)

    @cached_property
    def reference_logp(self) -> Tensor:
        """[P, n] log reference(y | x)."""
        return self.logp(self.reference)

    @property
    def start(self) -> Tensor:
        """[P * K, V] logits that training starts from: the author's."""
        return self.reference if self.author is None else self.author

    @cached_property
    def author_logp(self) -> Tensor:
        """[P, n] log author(y | x)."""
        return self.logp(self.start)

    @cached_property
    def reach(self) -> Tensor:
        """[P * K, V] the probability that the author comes to a prefix and goes on with a token."""
        rows = self._logits * self.language.size + self.language.token.repeat(self.prompts)
        drawn = self.author_logp.exp().reshape(-1).repeat_interleave(self.language.lengths.repeat(self.prompts))
        return torch.zeros(self.reference.numel(), dtype=torch.float64).index_add(0, rows, drawn).view_as(self.reference)

    @cached_property
    def _logits(self) -> Tensor:
        """[P * T] the row of logits before each token of each response."""
        return (torch.arange(self.prompts)[:, None] * len(self.language.prefixes) + self.language.prefix).reshape(-1)

    @cached_property
    def win(self) -> Tensor:
        """[P, n] the probability that a response is preferred to one of the author."""
        return (self.preference * self.author_logp.exp()[:, None, :]).sum(-1)

    def logp(self, table: Tensor) -> Tensor:
        """[P * K, V] logits -> [P, n] log-prob of every response."""
        whole = self.responses(table, ())
        return whole.logp.view(self.prompts, -1)

    def with_preference(self, preference: Tensor) -> World:
        """The same world with other preferences."""
        return dataclasses.replace(self, preference=preference)

    def flipped(self, share: float) -> World:
        """The same world where a share of the labels is the wrong way round."""
        return self.with_preference((1 - 2 * share) * self.preference + share)

    @cached_property
    def pairs(self) -> tuple[Rows, Rows, Tensor]:
        """Every ordered pair of responses to a prompt: B chosen and B rejected ones, and [B] the probability of this pair."""
        n = len(self.language.responses)
        first, second = torch.arange(self.prompts * n).view(-1, n, 1), torch.arange(self.prompts * n).view(-1, 1, n)
        drawn = self.author_logp.exp()
        weight = 2 * drawn[:, :, None] * drawn[:, None, :] * self.preference / self.prompts  # as chosen drawn first or second
        chosen, rejected = (self._rows(number.expand_as(weight).reshape(-1)) for number in (first, second))
        return chosen, rejected, weight.reshape(-1)

    @cached_property
    def labels(self) -> tuple[Rows, Tensor, Tensor]:
        """Every response as the chosen and as the rejected one of a pair: B rows, [B] label, [B] probability."""
        drawn, every = self.author_logp.exp() / self.prompts, torch.arange(self.reference_logp.numel())
        weight = torch.cat([(drawn * self.win).reshape(-1), (drawn * (1 - self.win)).reshape(-1)])
        label = torch.ones(len(every), dtype=torch.float64)
        return self._rows(every.repeat(2)), torch.cat([label, 1 - label]), weight

    @cached_property
    def mismatched(self) -> tuple[Rows, Tensor]:
        """Every response drawn for another prompt: B rows of it after this prompt, [B] probability."""
        drawn = self.author_logp.exp()
        weight = (drawn.sum(0) - drawn) / (self.prompts * (self.prompts - 1))
        return self._rows(torch.arange(drawn.numel())), weight.reshape(-1)

    @cached_property
    def groups(self) -> Rows:
        """Every group of two responses to a prompt, in order: B rows, the two of a group one after the other."""
        n = len(self.language.responses)
        every = torch.arange(self.prompts * n)
        first, second = (one.expand(self.prompts, n, n) for one in (every.view(-1, n, 1), every.view(-1, 1, n)))
        return self._rows(torch.stack([first, second], -1).reshape(-1))

    def drawn(self, logp: Tensor) -> Tensor:
        """[B] the probability of each row of `groups`, under a policy of these log-probs [P, n]."""
        p = logp.exp()
        return (p[:, :, None] * p[:, None, :] / (2 * self.prompts)).reshape(-1).repeat_interleave(2)

    def population(self, family: type, want: Sequence[Want], table: Tensor) -> tuple[Any, Tensor]:
        """What an objective of a family sees of everything that can happen under a model.

        Returns:
            The statistics of B rows, and [B] the probability of each row.
        """
        whole = self.responses(table, want)
        if issubclass(family, Labelled):
            rows, label, weight = self.labels
            return family(completion=rows.of(whole), label=label), weight
        *both, weight = self.pairs
        roles = dict(zip(roles_of(family), both, strict=True))
        columns = {name: self._column(name, roles) for name in columns_of(family)}
        return family(**{role: rows.of(whole) for role, rows in roles.items()}, **columns), weight

    def early(self, family: type, table: Tensor) -> tuple[Any, Tensor]:
        """What an objective sees before a step, as `population`."""
        rows, weight = self.mismatched
        nothing = dict.fromkeys([*roles_of(family), *columns_of(family)])
        return family(**nothing, **dict.fromkeys(early_roles_of(family), rows.of(self.responses(table, ())))), weight

    def _column(self, name: str, roles: dict[str, Rows]) -> Tensor:
        """[B] a column of the data: the reward of a role as its score, its probability to win against the author, the author's
        log-prob of it, and that of the first to be preferred to the second."""
        if name == "preference":
            n = len(self.language.responses)
            first, second = (one.number for one in roles.values())
            return self.preference[first // n, first % n, second % n]
        role = next(role for role in roles if role in name.split("_"))
        values = {"score": self.reward, "win": self.win, "previous": self.author_logp}[name.replace(role, "").strip("_")]
        return values.reshape(-1)[roles[role].number]

    def responses(self, table: Tensor, want: Sequence[Want]) -> Completions:
        """Every response to every prompt, by the kernel that training uses: a row of logits is a hidden state, and the head is
        the identity."""
        identity = torch.eye(self.language.size, dtype=torch.float64)
        policy, reference = Head(table[self._logits], identity), Head(self.reference[self._logits], identity)
        targets = self.language.token.repeat(self.prompts)
        more = vocabulary.statistics(policy, ["logp", "ref_logp", *want], targets=targets, ref=reference)
        logps, reference_logps = more.pop("logp"), more.pop("ref_logp")
        lengths = self.language.lengths.repeat(self.prompts)
        return Completions(logps=logps, lengths=lengths, reference_logps=reference_logps, more=more)

    def _rows(self, number: Tensor) -> Rows:
        every = self.language.lengths.repeat(self.prompts)
        lengths = every[number]
        shift = (every.cumsum(0) - every)[number] - (lengths.cumsum(0) - lengths)
        return Rows(number, lengths, torch.arange(int(lengths.sum())) + shift.repeat_interleave(lengths))


def bradley_terry(reward: Tensor) -> Tensor:
    """[P, n] rewards -> [P, n, n] probability that the first response is preferred."""
    return (reward[:, :, None] - reward[:, None, :]).sigmoid()


def world(size: int = 5, length: int = 3, prompts: int = 3, seed: int = 0) -> World:
    """The laboratory's world: a reference that is not uniform, and preferences of Bradley and Terry over rewards of which about
    half lie between 1/2 and 1, the others between -1 and -1/2: no response is preferred just as often as not."""
    generator, language = torch.Generator().manual_seed(seed), Language(size, length)
    shape = (prompts * len(language.prefixes), size)
    reference = 0.7 * torch.randn(shape, generator=generator, dtype=torch.float64)
    drawn = 2 * torch.rand((prompts, len(language.responses)), generator=generator, dtype=torch.float64) - 1
    reward = (drawn + drawn.sign()) / 2
    return World(language, reference, reward, bradley_terry(reward))
