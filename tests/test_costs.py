"""Statistics that see several tokens at once: from heads, against their definitions from whole logits."""

from __future__ import annotations

import torch
from posttrain_kernels import Head
from rows import by_definition

from posttrain.costs import some
from posttrain.stats import Costs, Spans
from posttrain.vocabulary import statistics


def heads(n: int, items: int, ref_items: int) -> tuple[Head, Head]:
    """Student and teacher of other widths, the teacher with rows that are padding."""
    torch.manual_seed(0)
    student = Head(
        torch.randn(n, 5, dtype=torch.float64, requires_grad=True),
        torch.randn(items, 5, dtype=torch.float64, requires_grad=True),
        bias=torch.randn(items, dtype=torch.float64),
    )
    return student, Head(torch.randn(n, 7, dtype=torch.float64), torch.randn(ref_items, 7, dtype=torch.float64))


def test_costs_and_spans_are_their_definitions() -> None:
    """At temperatures of their own, beside a statistic at temperature 1, with gradients to hidden states and weights."""
    student, teacher = heads(9, 31, 31)
    want = ["forward_kl", Costs(rows=6, temperature=2.0), Spans(temperature=0.5)]
    targets = torch.arange(9)
    logits = student.x @ student.weight.mT + student.bias
    defined = by_definition(logits, teacher.x @ teacher.weight.mT, targets, want)
    got = statistics(student, want, targets=targets, ref=teacher)
    assert set(got) == {"forward_kl", "cost", "cost_column", "span_cost"}
    assert got["cost"].shape == (9, 6) and torch.equal(got["cost_column"], defined["cost_column"])
    upstream = {name: torch.randn_like(value) for name, value in got.items() if value.is_floating_point()}
    gradients = []
    for side in (got, defined):
        total = sum((upstream[name] * side[name]).sum() for name in upstream)
        gradients.append(torch.autograd.grad(total, [student.x, student.weight]))
    for name in upstream:
        torch.testing.assert_close(got[name], defined[name], rtol=0, atol=1e-12)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_items_that_only_one_model_has_are_left_out() -> None:
    student, teacher = heads(4, 20, 26)
    got = statistics(student, [Costs(rows=9)], targets=torch.arange(4), ref=teacher)["cost"]
    q = (student.x @ student.weight.mT + student.bias).softmax(-1)
    p = (teacher.x @ teacher.weight[:20].mT).softmax(-1)
    torch.testing.assert_close(got, (q[:, None] - p).abs().sum(-1), rtol=0, atol=1e-12)


def test_the_tokens_decide_which_of_them_take_part() -> None:
    """The same whatever random numbers were drawn before, others for other tokens, all where there are few."""
    tokens = torch.arange(1000)
    first = some(tokens, 50)
    torch.rand(7)
    assert torch.equal(some(tokens, 50), first) and not torch.equal(some(tokens + 1, 50), first)
    assert torch.equal(first.unique(), first) and len(first) == 50
    assert some(tokens, 1000).tolist() == tokens.tolist()


def test_one_token_has_no_neighbour() -> None:
    student, teacher = heads(1, 20, 20)
    assert statistics(student, [Spans()], targets=torch.zeros(1, dtype=torch.int64), ref=teacher)["span_cost"].tolist() == [0]
