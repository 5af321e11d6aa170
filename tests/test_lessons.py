"""What holds for the lesson of every online objective, the part that sees a whole round. A new one needs no edit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from grids import together
from random_statistics import random_experience, random_statistics

from posttrain.experience import Experience, Lesson, token_columns_of
from posttrain.registry import Objective, find, names

ONLINE = [one for one in map(find, names()) if one.lesson is not None]

every_online_objective = pytest.mark.parametrize("objective", ONLINE, ids=lambda objective: objective.name)


def lesson_of(objective: Objective, experience: Experience) -> Lesson:
    return objective.lesson(objective.config(), experience)


def part(seen: Experience, rows: slice) -> Experience:
    """The experience of some whole groups."""
    bounds = [0, *seen.lengths.cumsum(0).tolist()]
    start, stop, _ = rows.indices(len(seen.lengths))
    tokens = slice(bounds[start], bounds[stop])
    cut = {
        name: None if vars(seen)[name] is None else vars(seen)[name][tokens]
        for name in ("old_logps", "engine_logps", "reference_logps")
    }
    of_rows = {name: vars(seen)[name][rows] for name in ("scores", "lengths", "finished")}
    return dataclasses.replace(seen, **cut, **of_rows, more={name: values[tokens] for name, values in seen.more.items()})


def equal(one: Lesson, other: Lesson) -> None:
    assert torch.equal(one.keep, other.keep)
    assert one.tokens.keys() == other.tokens.keys()
    for name, values in one.tokens.items():
        torch.testing.assert_close(values, other.tokens[name], rtol=0, atol=1e-12, msg=name)


@every_online_objective
def test_says_what_the_family_reads(objective: Objective) -> None:
    seen = random_experience(objective, objective.config())
    lesson = lesson_of(objective, seen)
    assert lesson.keep.dtype == torch.bool and lesson.keep.shape == seen.scores.shape and lesson.keep.any()
    assert list(lesson.tokens) == token_columns_of(objective.family)
    for name, values in lesson.tokens.items():
        assert values.shape == seen.old_logps.shape and values.isfinite().all() and not values.requires_grad, name
    for name, values in (*lesson.metrics.items(), *lesson.remember.items()):
        assert values.isfinite().all() and not values.requires_grad, name


@every_online_objective
def test_does_not_depend_on_how_a_round_is_split(objective: Objective) -> None:
    """Three processes, the second without completions."""
    seen = random_experience(objective, objective.config(), prompts=4)
    rows = [slice(0, 4), slice(4, 4), slice(4, 16)]

    def work(rank: int, total) -> Lesson:
        return lesson_of(objective, dataclasses.replace(part(seen, rows[rank]), total=total))

    whole, split = lesson_of(objective, seen), together(3, work)
    tokens = {name: torch.cat([one.tokens[name] for one in split]) for name in whole.tokens}
    equal(whole, Lesson(keep=torch.cat([one.keep for one in split]), tokens=tokens))
    for one in split:
        assert one.metrics.keys() == whole.metrics.keys() and one.remember.keys() == whole.remember.keys()


@every_online_objective
def test_groups_of_the_same_prompt_stand_together(objective: Objective) -> None:
    """The prompts of a round in another order: the same of each."""
    seen = random_experience(objective, objective.config(), prompts=3)
    whole = lesson_of(objective, seen)
    parts = [part(seen, slice(4 * number, 4 * number + 4)) for number in (2, 0, 1)]
    other = lesson_of(objective, joined(parts))
    assert torch.equal(other.keep, torch.cat([whole.keep[8:], whole.keep[:8]]))
    first = int(seen.lengths[:8].sum())
    for name, values in whole.tokens.items():
        torch.testing.assert_close(
            other.tokens[name], torch.cat([values[first:], values[:first]]), rtol=0, atol=1e-12, msg=name
        )


def joined(parts: list[Experience]) -> Experience:
    """Several as one."""
    columns = ("scores", "lengths", "finished", "old_logps", "engine_logps", "reference_logps")
    whole = {name: [vars(one)[name] for one in parts] for name in columns}
    more = {name: torch.cat([one.more[name] for one in parts]) for name in parts[0].more}
    return dataclasses.replace(
        parts[0], **{name: None if values[0] is None else torch.cat(values) for name, values in whole.items()}, more=more
    )


@every_online_objective
def test_lesson_or_loss_reads_the_reference_iff_declared(objective: Objective) -> None:
    config = objective.config()
    seen = random_experience(objective, config)
    lesson = lesson_of(objective, seen)
    read = False
    if seen.reference_logps is not None:
        moved = dataclasses.replace(seen, reference_logps=seen.reference_logps - torch.rand(seen.old_logps.numel()))
        other = lesson_of(objective, moved)
        read = any(not torch.equal(values, other.tokens[name]) for name, values in lesson.tokens.items())
    statistics = random_statistics(objective.family, want=objective.want(config))
    one = statistics.completion
    flipped = dataclasses.replace(statistics, completion=one.replaced(reference=one.reference.flip(-1)))
    read |= not torch.equal(objective(config, statistics).values, objective(config, flipped).values)
    assert read == objective.reads_reference(config)
