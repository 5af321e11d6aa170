"""Random statistics of any family, made from its annotations: what the tests over all objectives run on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rows import LAYERS, by_definition
from torch.overrides import TorchFunctionMode

from posttrain.experience import Experience, Sampled, token_columns_of
from posttrain.learned import Own
from posttrain.mismatch import early_roles
from posttrain.registry import Objective
from posttrain.scores import Scored, Scores
from posttrain.stats import Completions, Loss, Sizes, Want, columns_of
from posttrain.stats import roles_of as roles

VOCABULARY = 7

FRACTIONS = ("chosen_win", "rejected_win", "preference")
"""Columns of numbers between 0 and 1."""

SUMS = ("previous_chosen", "previous_rejected")
"""Columns of log-probs of completions; every column that is in neither holds zeros and ones."""


@dataclass(frozen=True, kw_only=True)
class Drawn(Completions):
    """Completions and the random logits that all their statistics follow from."""

    policy: torch.Tensor
    """[N, V] logits, float64: a leaf with gradient."""

    reference: torch.Tensor
    """[N, V] logits, float64."""

    targets: torch.Tensor
    """[N] the tokens."""

    want: Sequence[Want]
    """What is in `more`."""

    own: Own | None
    """The objective's own parameters, which add to `more`."""

    def replaced(self, **changes: Any) -> Drawn:
        """The completions of other logits, targets or lengths."""
        same = {name: getattr(self, name) for name in ("policy", "reference", "targets", "lengths", "want", "own")}
        return drawn(**{**same, **changes}, dtype=self.logps.dtype)


@dataclass(frozen=True, kw_only=True)
class DrawnScores(Scores):
    """Random scores."""

    policy: torch.Tensor
    """[B] float64: a leaf with gradient."""

    def replaced(self, *, policy: torch.Tensor, lengths: torch.Tensor | None = None) -> DrawnScores:
        """Other scores, of completions of other lengths."""
        lengths = self.lengths if lengths is None else lengths
        return DrawnScores(policy=policy, values=policy.to(self.values.dtype), lengths=lengths)


def drawn(
    *,
    policy: torch.Tensor,
    reference: torch.Tensor,
    targets: torch.Tensor,
    lengths: torch.Tensor,
    want: Sequence[Want],
    own: Own | None,
    dtype: torch.dtype,
) -> Drawn:
    """The completions of these logits, their statistics by definition and then rounded to `dtype`."""
    exact = by_definition(policy, reference, targets, ["logp", "ref_logp", *want])
    exact |= {} if own is None else own({"hidden": policy, **exact}, lengths)
    more = {name: values.to(dtype) if values.is_floating_point() else values for name, values in exact.items()}
    logps, reference_logps = more.pop("logp"), more.pop("ref_logp")
    return Drawn(
        logps=logps,
        lengths=lengths,
        reference_logps=reference_logps,
        more=more,
        policy=policy,
        reference=reference,
        targets=targets,
        want=want,
        own=own,
    )


def own_of(objective: Objective, config: Any) -> Own | None:
    """The objective's own parameters, at random, for statistics of `random_statistics`."""
    if objective.learned is None:
        return None
    sizes = Sizes(hidden=VOCABULARY, vocabulary=VOCABULARY, reference_hidden=VOCABULARY, reference_layers=LAYERS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        values = objective.learned.start(config, sizes)
        moved = {name: value.double() + 0.1 * torch.rand(value.shape, dtype=torch.float64) for name, value in values.items()}
    return Own(objective.learned, config, moved) if values else None


def random_statistics(
    family: type,
    *,
    seed: int = 0,
    rows: int = 4,
    want: Sequence[Want] = (),
    own: Own | None = None,
    dtype: torch.dtype = torch.float64,
    early: Sequence[str] = (),
) -> Any:
    """Statistics of `rows` rows: completions of 1 to 5 tokens (`Drawn`), columns of numbers of a row and of a token.

    With `early` those before a step: of completions these roles alone.
    """
    generator = torch.Generator().manual_seed(seed)

    def completions() -> Drawn | DrawnScores:
        lengths = torch.randint(1, 6, (rows,), generator=generator)
        if issubclass(family, Scored):
            scores = torch.randn(rows, generator=generator, dtype=torch.float64).requires_grad_()
            return DrawnScores(policy=scores, values=scores.to(dtype), lengths=lengths)
        n = int(lengths.sum())
        logits = lambda: torch.randn(n, VOCABULARY, generator=generator, dtype=torch.float64)  # noqa: E731
        targets = torch.randint(VOCABULARY, (n,), generator=generator)
        policy, reference = logits().requires_grad_(), logits()
        sides = {"policy": policy, "reference": reference, "targets": targets}
        return drawn(**sides, lengths=lengths, want=want, own=own, dtype=dtype)

    def column(name: str) -> torch.Tensor:
        if name in SUMS:
            return -(torch.randint(0, 64, (rows,), generator=generator) / 4).to(dtype)
        steps = 256 if name in FRACTIONS else 1
        return (torch.randint(0, steps + 1, (rows,), generator=generator) / steps).to(dtype)

    there = {name: completions() for name in early or roles(family)}

    def token_column(name: str) -> torch.Tensor:
        (one,) = there.values()
        noise = torch.randn(one.logps.numel(), generator=generator, dtype=torch.float64)
        near = {"old_logps": one.logps.detach().double() + 0.1 * noise, "weights": (0.1 * noise).exp()}
        return near.get(name, noise).to(dtype)

    columns = {name: column(name) for name in columns_of(family)}
    columns |= {name: token_column(name) for name in token_columns_of(family)}
    return family(**dict.fromkeys(roles(family)) | there, **columns)


def random_experience(objective: Objective, config: Any, *, seed: int = 0, prompts: int = 3, group: int = 4) -> Experience:
    """A round of rollouts: statistics of the policy as it sampled, an engine that is a little off, scores."""
    own, want = own_of(objective, config), objective.want(config)
    one = random_statistics(Sampled, seed=seed, rows=prompts * group, want=want, own=own).completion
    generator = torch.Generator().manual_seed(seed + 1)
    noise = 0.1 * torch.randn(one.logps.numel(), generator=generator, dtype=torch.float64)
    return Experience(
        scores=torch.randn(prompts * group, generator=generator, dtype=torch.float64),
        lengths=one.lengths,
        group=group,
        finished=torch.rand(prompts * group, generator=generator) < 0.7,
        old_logps=one.logps.detach(),
        engine_logps=one.logps.detach() + noise,
        reference_logps=one.reference_logps if objective.reads_reference(config) else None,
        more={name: values.detach() for name, values in one.more.items()},
        context=state_of(objective, config),
    )


def context_of(objective: Objective, statistics: Any, *, start: bool = False, **options: Any) -> Any:
    """The statistics with the objective's state as it starts and the means that its `before` gives, of random completions
    where it reads early roles.

    Args:
        objective: with default settings.
        statistics: random ones of its family.
        start: policy and reference are equal before the step, too.
        options: of `random_statistics`.
    """
    if objective.before is None:
        return dataclasses.replace(statistics, context=state_of(objective))
    names = [*early_roles(objective), *objective.before_reads]
    early = random_statistics(objective.family, early=names, **options) if names else statistics
    values = objective.before(objective.config(), at_reference(early) if start else early)
    means = {name: value.detach().mean() for name, value in values.items()}
    return dataclasses.replace(statistics, context={**state_of(objective), **means})


def state_of(objective: Objective, config: Any = None) -> dict[str, torch.Tensor]:
    """The state of an objective before the first step; with default settings where none are given."""
    numbers = {} if objective.state is None else objective.state(config or objective.config(), {}, {})
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}


def each(statistics: Any, change: Callable[[Any], Any]) -> Any:
    """The same statistics with every role's completions changed."""
    there = {name: one for name, one in vars(statistics).items() if isinstance(one, Completions | Scores)}
    return dataclasses.replace(statistics, **{role: change(one) for role, one in there.items()})


def at_reference(statistics: Any) -> Any:
    """The statistics where the policy equals the reference; scores have none."""
    if isinstance(statistics, Scored):
        return statistics
    return each(statistics, lambda one: one.replaced(policy=one.reference.clone().requires_grad_()))


def take(statistics: Any, order: Sequence[int]) -> Any:
    """The rows `order` of the statistics, their logits new leaves."""

    def tokens(one: Drawn) -> torch.Tensor:
        ends = one.lengths.cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        return torch.tensor([t for row in order for t in range(starts[row], ends[row])])

    def rows_of(one: Drawn | DrawnScores) -> Drawn | DrawnScores:
        if isinstance(one, DrawnScores):
            chosen = one.policy.detach()[list(order)].requires_grad_()
            return one.replaced(policy=chosen, lengths=one.lengths[list(order)])
        index = tokens(one)
        return one.replaced(
            policy=one.policy.detach()[index].requires_grad_(),
            reference=one.reference[index],
            targets=one.targets[index],
            lengths=one.lengths[list(order)],
        )

    family = type(statistics)
    return dataclasses.replace(
        statistics,
        **{name: rows_of(getattr(statistics, name)) for name in roles(family)},
        **{name: getattr(statistics, name)[list(order)] for name in columns_of(family)},
        **{name: getattr(statistics, name)[tokens(statistics.completion)] for name in token_columns_of(family)},
    )


def leaves(statistics: Any) -> list[torch.Tensor]:
    """The policy's logits, or the scores, of every role."""
    return [getattr(statistics, role).policy for role in roles(type(statistics))]


class Held(TorchFunctionMode):
    """What is detached is the same in every evaluation as in the first: a stop-gradient is a constant when differentiating.

    Enter it anew for each evaluation.
    """

    def __init__(self) -> None:
        super().__init__()
        self._first: list[torch.Tensor] | None = None
        self._now: list[torch.Tensor] = []

    def __enter__(self) -> Held:
        self._now = []
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._first = self._first or self._now
        super().__exit__(*error)

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function is torch.Tensor.detach:
            self._now.append(out)
            out = out if self._first is None else self._first[len(self._now) - 1]
        return out


def terms(loss: Loss) -> list[Loss]:
    """The loss and the terms added to it."""
    return [loss] if loss.plus is None else [loss, *terms(loss.plus)]


def by_row(loss: Loss, statistics: Any) -> list[torch.Tensor]:
    """Per row, the loss values of every term that belong to it."""
    parts = []
    for term in terms(loss):
        lengths = None if term.per == "row" else getattr(statistics, term.per).lengths.tolist()
        parts.append(term.values.split(1 if lengths is None else lengths))
    return [torch.cat(row) for row in zip(*parts, strict=True)]
