"""What holds for every objective of the package. A new objective is tested here without an edit."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from random_statistics import (
    Held,
    at_reference,
    by_row,
    context_of,
    each,
    leaves,
    own_of,
    random_statistics,
    roles,
    state_of,
    take,
    terms,
)

from posttrain.registry import Objective, find, names
from posttrain.schema import fields
from posttrain.scores import Scores
from posttrain.stats import bound

ROOT = Path(__file__).parents[1]

every_objective = pytest.mark.parametrize("objective", [find(name) for name in names()], ids=lambda objective: objective.name)


def statistics_for(objective: Objective, *, start: bool = False, **options: Any) -> Any:
    """Random statistics with their context; `start`: where the policy equals the reference."""
    config = objective.config()
    options |= {"want": bound(objective.want(config), state_of(objective)), "own": own_of(objective, config)}
    statistics = random_statistics(objective.family, **options)
    return context_of(objective, at_reference(statistics) if start else statistics, start=start, **options)


@every_objective
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_finite(objective: Objective, dtype: torch.dtype) -> None:
    statistics = statistics_for(objective, dtype=dtype)
    loss = objective(objective.config(), statistics)
    for term in terms(loss):
        assert term.values.dtype == torch.float32 and term.values.isfinite().all()
    gradients = torch.autograd.grad(sum(term.values.sum() for term in terms(loss)), leaves(statistics))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients)


@every_objective
def test_bfloat16_statistics_are_summed_in_float32(objective: Objective) -> None:
    """The only error of bf16 statistics is the rounding of the statistics themselves."""
    low = statistics_for(objective, dtype=torch.bfloat16)
    high = statistics_for(objective, dtype=torch.bfloat16)

    def widened(completions):
        if isinstance(completions, Scores):
            return dataclasses.replace(completions, values=completions.values.double())
        more = {name: v.double() if v.is_floating_point() else v for name, v in completions.more.items()}
        logps, reference_logps = completions.logps.double(), completions.reference_logps.double()
        return dataclasses.replace(completions, logps=logps, reference_logps=reference_logps, more=more)

    config = objective.config()
    for got, expected in zip(terms(objective(config, low)), terms(objective(config, each(high, widened))), strict=True):
        torch.testing.assert_close(got.values.double(), expected.values.double(), rtol=1e-5, atol=1e-5)


@every_objective
def test_values_are_one_a_row_or_one_a_token(objective: Objective) -> None:
    statistics = statistics_for(objective, rows=3)
    for term in terms(objective(objective.config(), statistics)):
        expected = 3 if term.per == "row" else getattr(statistics, term.per).logps.numel()
        assert term.per in {"row", *roles(objective.family)}
        assert term.values.shape == (expected,)


@every_objective
def test_permuting_rows_permutes_values(objective: Objective) -> None:
    statistics, order, config = statistics_for(objective), [2, 0, 3, 1], objective.config()
    values = by_row(objective(config, statistics), statistics)
    permuted = take(statistics, order)
    for got, row in zip(by_row(objective(config, permuted), permuted), order, strict=True):
        torch.testing.assert_close(got, values[row], rtol=0, atol=1e-12)


@every_objective
def test_a_row_alone_has_the_value_it_has_among_others(objective: Objective) -> None:
    """So neither the other rows nor their lengths matter, in value or in gradient."""
    if objective.coupled:
        pytest.skip("declared as coupled: rows of a micro-batch affect each other")
    statistics, config = statistics_for(objective), objective.config()
    together = by_row(objective(config, statistics), statistics)
    for row, value in enumerate(together):
        alone = take(statistics, [row])
        (own,) = by_row(objective(config, alone), alone)
        torch.testing.assert_close(own, value, rtol=0, atol=1e-12)
        expected = torch.autograd.grad(own.sum(), leaves(alone))
        rest = torch.autograd.grad(value.sum(), leaves(statistics), retain_graph=True)
        for role, gradient, whole in zip(roles(objective.family), expected, rest, strict=True):
            split = whole.split(1 if objective.scores else getattr(statistics, role).lengths.tolist())
            torch.testing.assert_close(split[row], gradient, rtol=0, atol=1e-12)
            assert all(part.abs().max() == 0 for other, part in enumerate(split) if other != row)


@every_objective
def test_a_process_may_have_no_rows(objective: Objective) -> None:
    """Where an epoch's last rows do not reach everyone: the same metrics, no value, and a gradient of 0 for every parameter."""
    config, own = objective.config(), own_of(objective, objective.config())
    options = {"want": bound(objective.want(config), state_of(objective)), "own": own}
    statistics = random_statistics(objective.family, rows=0, **options)
    some = statistics_for(objective)
    loss = objective(config, dataclasses.replace(statistics, context=some.context))
    parameters = [*leaves(statistics), *([] if own is None else own.parameters())]
    gradients = torch.autograd.grad(sum(term.values.sum() for term in terms(loss)), parameters, allow_unused=True)
    assert all(term.values.shape == (0,) for term in terms(loss))
    assert all(gradient is None or not gradient.any() for gradient in gradients)
    assert any(gradient is not None for gradient in gradients)
    for one, other in zip(terms(loss), terms(objective(config, some)), strict=True):
        assert one.metrics.keys() == other.metrics.keys() and one.remember.keys() == other.remember.keys()
        assert all(value.isfinite().all() for value in one.metrics.values())


@every_objective
def test_gradcheck(objective: Objective) -> None:
    """In the logits, through all statistics; what an objective detaches is a constant."""
    statistics, held = statistics_for(objective, rows=2), Held()

    def values(*logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        moved = iter(logits)
        with held:
            changed = each(statistics, lambda one: one.replaced(policy=next(moved)))
            return tuple(term.values for term in terms(objective(objective.config(), changed)))

    assert torch.autograd.gradcheck(values, leaves(statistics))


@every_objective
def test_start_value(objective: Objective) -> None:
    """At policy == reference the mean loss is what the objective states; where it states none, it depends on the data."""
    config = objective.config()
    start = objective.start(config)
    means = []
    for seed in (1, 2):
        loss = objective(config, statistics_for(objective, seed=seed, start=True))
        means.append(sum(term.values.mean().item() for term in terms(loss)))
    if start is None:
        assert abs(means[0] - means[1]) > 1e-12
    else:
        assert means == pytest.approx([start, start], abs=1e-12)


@every_objective
def test_reads_the_reference_iff_declared(objective: Objective) -> None:
    if objective.scores:
        pytest.skip("scores have no reference")
    statistics, config = statistics_for(objective), objective.config()
    values = [term.values for term in terms(objective(config, statistics))]
    moved = each(statistics, lambda role: dataclasses.replace(role, reference_logps=role.reference_logps - role.position))
    without = each(statistics, lambda role: dataclasses.replace(role, reference_logps=None))
    others = [term.values for term in terms(objective(config, moved))]
    same = all(torch.equal(one, other) for one, other in zip(values, others, strict=True))
    if objective.lesson is not None:
        return  # what is read of the reference may be read by the lesson: test_lessons.py
    if objective.reads_teacher:
        other = each(statistics, lambda role: role.replaced(reference=role.reference.flip(-1)))
        assert not all(torch.equal(x, y.values) for x, y in zip(values, terms(objective(config, other)), strict=True))
    elif objective.reads_reference(config):
        assert not same
        with pytest.raises(AssertionError, match="does not declare reference=True"):
            objective(config, without)
    else:
        assert same
        objective(config, without)


@every_objective
def test_metrics_are_finite_and_detached(objective: Objective) -> None:
    statistics = statistics_for(objective)
    for term in terms(objective(objective.config(), statistics)):
        for name, metric in term.metrics.items():
            assert not metric.requires_grad, name
            assert metric.isfinite().all(), name


@every_objective
def test_does_not_write_to_its_statistics(objective: Objective) -> None:
    statistics, same = statistics_for(objective), statistics_for(objective)
    objective(objective.config(), statistics)
    for role in roles(objective.family):
        one, other = getattr(statistics, role), getattr(same, role)
        if objective.scores:
            assert torch.equal(one.values, other.values)
            continue
        assert torch.equal(one.logps, other.logps) and torch.equal(one.reference_logps, other.reference_logps)
        assert all(torch.equal(values, other.more[name]) for name, values in one.more.items())


@every_objective
def test_document_has_equation_source_and_start(objective: Objective) -> None:
    assert re.search(r"^ {4}\S.* = ", objective.document, re.MULTILINE), "no indented equation"
    assert re.search(r"^Source: \S.*(arXiv|doi|http|\d{4})", objective.document, re.MULTILINE)
    stated = re.search(r"^Value at policy == reference: (.+)", objective.document, re.MULTILINE)
    assert stated
    assert objective.document.partition("\n")[0].endswith(".")


@every_objective
def test_settings_are_frozen_described_and_have_defaults(objective: Objective) -> None:
    config = objective.config()
    settings = fields(objective.config)
    assert [setting["name"] for setting in settings] == [field.name for field in dataclasses.fields(config)]
    for setting in settings:
        assert "default" in setting, setting["name"]
        assert setting["description"].endswith("."), setting["name"]
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, setting["name"], setting["default"])


@every_objective
def test_has_recipes_and_a_test(objective: Objective) -> None:
    recipes = {path.name for path in (ROOT / "recipes" / objective.name).glob("*.yaml")}
    assert "local.yaml" in recipes, "no recipe for a small model and a file"
    assert len(recipes) > 1, "no recipe of a real run"
    assert (ROOT / "tests" / "objectives" / f"test_{objective.name}.py").exists()


def test_names_are_those_of_the_files() -> None:
    assert {find(name).name for name in names()} == set(names())
    for name, module in names().items():
        assert find(name).function.__module__ == module
        assert (ROOT / Path(*module.split("."))).with_suffix(".py").exists()
