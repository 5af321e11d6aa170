"""Statistics: what the models say of a batch of trees, per completion token, and what an objective returns.

Completions of one role (chosen, rejected, ...) are stored end to end without padding. Letters in shape comments:
N tokens of one role, B sequences of one role (for pairs: B pairs).
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch

from .scores import Scores


def wide(values: torch.Tensor) -> torch.Tensor:
    """The same in float32 or better: what sums and losses are computed in."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


@dataclass(frozen=True, kw_only=True)
class Sum:
    """A statistic of two models' distributions over the vocabulary, [N]: the sum over items of a function of both log-probs."""

    name: str
    """Its key in `Completions`."""

    summand: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """(log policy, log reference), equal shapes -> the term of the sum, elementwise."""

    slope: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    """The derivative of `summand` in log policy, where it is worth writing down; else autograd takes it."""

    divergence: str | None = None
    """What divergences.py calls the same function, if it is there: the kernel may have a form of its own for it."""

    temperature: float = 1.0
    """Divides the logits of both models."""

    eager: bool = False
    """The loss is a mean of this over tokens, so that the kernel may take its gradient in the forward pass."""


@dataclass(frozen=True, kw_only=True)
class Rowwise:
    """A statistic of two models' distributions over the vocabulary, [N]: any function of the two at one token."""

    name: str
    """Its key in `Completions`."""

    f: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """(log policy [n, V], log reference [n, V], tokens [n]) -> [n], for a block of n tokens at a time; differentiable in log
    policy. The vocabulary is what both models have, and both log-probs are normalised over it."""

    also: tuple[str, ...] = ()
    """Keys of further numbers of a token, for metrics, that f gives beside its value: (value [n], *others [n])."""

    temperature: float = 1.0
    """Divides the logits of both models."""

    eager: bool = False
    """The loss is a mean of this over tokens, so that the kernel may take its gradient in the forward pass."""

    given: tuple[str, ...] = ()
    """Scalars of the context that f takes, too, as keywords."""


@dataclass(frozen=True, kw_only=True)
class Top:
    """The k likeliest items of the reference at each token, [N, k] each, likeliest first: `top_ids`, `top_reference_logps` and,
    with gradient, `top_logps`, the policy's log-probs of the same items. At most k: all items of a small vocabulary."""

    k: int

    temperature: float = 1.0
    """Divides the logits of both models."""


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """The k largest probabilities of each model at each token, whichever items they are of, largest first: `ranked_logps`,
    with gradient, and `ranked_reference_logps`, [N, k] each or as many as a vocabulary has. The vocabularies need nothing in
    common. Of a reference with a tokenizer of its own, `paired` [N] says where it has a token to compare with (1, else 0)."""

    k: int

    temperature: float = 1.0
    """Divides the logits of both models."""


@dataclass(frozen=True, kw_only=True)
class States:
    """What the reference's layers say of each token, `reference_states` [N, L, H]: the hidden state after each of its L decoder
    layers, the last one after the final norm; in the dtype it computes in."""


@dataclass(frozen=True, kw_only=True)
class Activations:
    """The mean over features of what one kind of module in each of the reference's layers puts out, `reference_<of>` [N, L]."""

    of: Literal["mlp", "attention", "residual", "logits"]
    """The MLP, the attention, the layer itself; or, once for the model [N, 1], the output head before any soft-cap."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """How far the policy's distribution at one token is from the reference's at another: `cost` [N, M], the L1 distances, with
    gradient, from tokens to M of them, and `cost_column` [N] int64, which of the M a token is itself; -1 at the tokens that are
    none of them, whose row in `cost` is 0. Takes M^2 V operations."""

    rows: int
    """M; all N where that is less, else a random subset that the tokens themselves decide."""

    temperature: float = 1.0
    """Divides the logits of both models."""


@dataclass(frozen=True, kw_only=True)
class Spans:
    """How far the two models are apart on two adjacent tokens together, `span_cost` [N]: the sum over the vocabulary of squared
    differences between the product of the policy's probabilities of an item at a token and at the one before, and that of the
    reference's. The first of the N has none, 0; the first of any other completion is paired with another's last token."""

    temperature: float = 1.0
    """Divides the logits of both models."""


Inside = States | Activations
"""What is read inside of the reference, for which neither log-probs nor an output head do."""

Want = str | Sum | Rowwise | Top | Ranked | Costs | Spans | Inside
"""What an objective asks for beyond log-probs: a statistic of the kernel or a divergence, by name, or one of the above."""


def bound(want: Sequence[Want], context: Mapping[str, torch.Tensor]) -> list[Want]:
    """The same statistics, those of a `Rowwise` that takes scalars with them in place."""
    return [
        dataclasses.replace(entry, f=partial(entry.f, **{name: context[name] for name in entry.given}), given=())
        if isinstance(entry, Rowwise) and entry.given
        else entry
        for entry in want
    ]


@dataclass(frozen=True, kw_only=True)
class Completions:
    """Per-token statistics of B completions laid end to end, completion b before completion b + 1.

    All values are in nats and at temperature 1 unless the objective asked for another.
    """

    logps: torch.Tensor
    """[N] log policy(y_t | prompt, y_<t), with gradient."""

    lengths: torch.Tensor
    """[B] number of tokens of each completion; sums to N."""

    reference_logps: torch.Tensor | None = None
    """[N] log reference(y_t | prompt, y_<t), no gradient; only where the objective declares `reference=True`."""

    more: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """[N] or [N, k] each: what else the objective asked for in `want`, by name (entropy, forward_kl, log_sum_p2, ...)."""

    def __getitem__(self, name: str) -> torch.Tensor:
        """[N] or [N, k] one of the statistics the objective asked for."""
        return self.more[name]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """[N] -> [B] sum over the tokens of each completion, in float32 or better."""
        return torch.segment_reduce(wide(values), "sum", lengths=self.lengths, initial=0, unsafe=True)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """[N] -> [B] mean over the tokens of each completion (0 for an empty one)."""
        return self.sum(values) / self.lengths.clamp(min=1)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """[B] -> [N] the value of each completion at each of its tokens."""
        return values.repeat_interleave(self.lengths, output_size=self.logps.numel())

    @property
    def position(self) -> torch.Tensor:
        """[N] index of each token within its completion, from 0."""
        starts = self.lengths.cumsum(0) - self.lengths
        return torch.arange(self.logps.numel(), device=self.logps.device) - self.spread(starts)

    @property
    def logp(self) -> torch.Tensor:
        """[B] log policy(y | prompt)."""
        return self.sum(self.logps)

    @property
    def reference_logp(self) -> torch.Tensor:
        """[B] log reference(y | prompt)."""
        assert self.reference_logps is not None, "the objective reads the reference but does not declare reference=True"
        return self.sum(self.reference_logps)

    @property
    def logratios(self) -> torch.Tensor:
        """[N] log policy(y_t) - log reference(y_t), in float32 or better."""
        assert self.reference_logps is not None, "the objective reads the reference but does not declare reference=True"
        return wide(self.logps) - wide(self.reference_logps)

    @property
    def logratio(self) -> torch.Tensor:
        """[B] log policy(y) - log reference(y), summed over tokens."""
        return self.sum(self.logratios)

    def at_reference(self) -> Completions:
        """The same completions as they are where the policy equals the reference."""
        return dataclasses.replace(self, logps=self.reference_logps)


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """B prompts with a chosen and a rejected completion each: the preference family."""

    chosen: Completions
    """The preferred completion of each pair."""

    rejected: Completions
    """The other completion of each pair."""

    context: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Scalars without gradient that no single row knows: `progress` in [0, 1] through the training; the global mean, over the
    optimizer step, of each value that the objective's `before` returns; the running global mean, over all earlier steps, of
    each value that it asked to `remember`; the numbers of the objective's `state`."""


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """B prompts with one completion each, which is desirable or not: the family of unpaired feedback."""

    completion: Completions
    """The completion of each row."""

    label: torch.Tensor
    """[B] 1 where the completion is desirable, 0 where it is not."""

    mismatched: Completions | None = field(default=None, metadata={"of": "completion"})
    """The completion of another row after this row's prompt; there only for the objective's `before`, and then, of completions,
    alone but for those that its `before_reads` names."""

    context: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """As in `Pairs`."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """B prompts with one completion each, to be imitated: the family of supervised fine-tuning."""

    completion: Completions
    """The completion of each row."""

    context: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """As in `Pairs`."""


@dataclass(frozen=True, kw_only=True)
class Taught:
    """B prompts with one completion each, read by a teacher, too: the family of distillation. The teacher is the reference of
    `Completions`: `reference_logps` are its log-probs, a divergence is one between student (policy) and teacher."""

    completion: Completions
    """The completion of each row: of the data, or sampled."""

    context: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """As in `Pairs`."""

    others: Sequence[Taught] = ()
    """The same beside each further teacher; not for objectives, whose loss is taken of each (teachers.py)."""


def roles_of(family: type) -> list[str]:
    """The completions a family holds: its fields annotated `Completions` or `Scores`, in order."""
    hints = typing.get_type_hints(family)
    return [field.name for field in dataclasses.fields(family) if hints[field.name] in (Completions, Scores)]


def early_roles_of(family: type) -> dict[str, str]:
    """The completions that are there only before a step: its fields annotated `Completions | None`.

    Returns:
        Name -> the role it takes them from, of a row with another prompt (`of` in the field's metadata).
    """
    hints = typing.get_type_hints(family)
    return {f.name: f.metadata["of"] for f in dataclasses.fields(family) if hints[f.name] == Completions | None}


def columns_of(family: type) -> dict[str, float | None]:
    """The numbers a family takes from each row of data: its fields annotated `Tensor`, but for those of each token. Name ->
    what it is where the data have no such column (`absent` in the field's metadata); None where they have to have it."""
    hints = typing.get_type_hints(family)
    numbers = [f for f in dataclasses.fields(family) if hints[f.name] is torch.Tensor and f.metadata.get("per") != "token"]
    return {f.name: f.metadata.get("absent") for f in numbers}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the shapes of an objective's own parameters follow from."""

    hidden: int
    """Width of the policy."""

    vocabulary: int
    """Items of its vocabulary."""

    reference_hidden: int
    """Width of the reference."""

    reference_layers: int
    """Decoder layers of the reference."""


@dataclass(frozen=True, kw_only=True)
class Learned:
    """Parameters of an objective's own, trained beside the policy, and what they say of each token: functions of its config.

    The trainer makes them a module of the policy, in float32 or better: optimised, sharded, saved and resumed with it, and left
    out of the exported model.
    """

    start: Callable[[Any, Sizes], Mapping[str, torch.Tensor]]
    """(config, sizes) -> what each parameter starts as, drawn from torch's generator; none where these settings need none."""

    statistics: Callable[[Any, Mapping[str, torch.Tensor], Completions], Mapping[str, torch.Tensor]]
    """(config, parameters, completions of one or several roles end to end) -> further statistics of their N tokens, [N] or
    [N, k] each, by name. The completions have the policy's final hidden states, too, with gradient: `hidden` [N, H]."""

    learning_rate: Callable[[Any], float | None] = lambda _config: None
    """From the config; None is the run's."""

    weight_decay: Callable[[Any], float] = lambda _config: 0.0
    """From the config."""


@dataclass(frozen=True)
class Loss:
    """Unreduced losses and what to log. The trainer takes the mean, over micro-batches and processes, with the global count."""

    values: torch.Tensor
    """[B] one loss a row, or [N] one a token of the role that `per` names."""

    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Detached quantities of any length, logged as the global mean of their elements; one that ends in `/max`, `/min`, `/sum`
    or `/std` as the global maximum, minimum, sum or standard deviation, in `/p10` (any two digits) as the global quantile, in
    `/ess` as the effective sample size of weights, (sum of w)^2 / sum of w^2, as a share of their number."""

    per: str = "row"
    """What the mean is over: `row`, or the name of a role (`chosen`, ...): all tokens of that role."""

    plus: Loss | None = None
    """A further term with a mean of its own, added to this one."""

    remember: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Detached values of any length; from the next step on their global running mean is in the context under their name."""


def reward_metrics(chosen: torch.Tensor, rejected: torch.Tensor) -> dict[str, torch.Tensor]:
    """The four reward metrics of a preference loss.

    Args:
        chosen, rejected: [B] the implied rewards exactly as they stand in the loss.

    Returns:
        `rewards/chosen`, `rewards/rejected`, `rewards/margins` (their difference) and `rewards/accuracies` (the share of
        pairs whose chosen reward is the larger, a tie counting half), each [B].
    """
    chosen, rejected = chosen.detach(), rejected.detach()
    margins = chosen - rejected
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": margins,
        "rewards/accuracies": (1 + margins.sign()) / 2,
    }


def label_metrics(rewards: torch.Tensor, label: torch.Tensor) -> dict[str, torch.Tensor]:
    """The reward metrics of a loss on labelled completions.

    Args:
        rewards: [B] the implied rewards.
        label: [B] 1 desirable, 0 undesirable.

    Returns:
        `rewards/desirable` and `rewards/undesirable`, of any length, and `count/desirable/sum` and `count/undesirable/sum`.
    """
    rewards, desirable = rewards.detach(), label > 0.5
    return {
        "rewards/desirable": rewards[desirable],
        "rewards/undesirable": rewards[~desirable],
        "count/desirable/sum": desirable.float(),
        "count/undesirable/sum": (~desirable).float(),
    }
