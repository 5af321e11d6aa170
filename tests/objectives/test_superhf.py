"""SuperHF: which completions are kept, and the loss by hand. There is no golden file of the authors' step."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from grids import same, tensor
from random_statistics import random_statistics
from rows import by_definition

from posttrain.experience import Experience, Kept
from posttrain.objectives.online.superhf import SuperHFConfig
from posttrain.registry import find
from posttrain.schema import UserError, parse
from posttrain.stats import Completions

SUPERHF = find("superhf")

SEEN = Experience(
    scores=tensor([0.0, 2.0, 1.0, 3.0, 3.0, -1.0]),
    lengths=torch.ones(6, dtype=torch.int64),
    group=3,
    finished=torch.ones(6, dtype=torch.bool),
    old_logps=torch.zeros(6),
)


def test_the_best_of_each_group_are_kept() -> None:
    """The first of equals."""
    got = SUPERHF.lesson(SuperHFConfig(), SEEN)
    assert got.keep.tolist() == [False, True, False, True, False, False]
    assert SUPERHF.lesson(SuperHFConfig(keep=2), SEEN).keep.tolist() == [False, True, True, True, True, False]
    same(got.metrics["reward/kept"], [2.0, 3.0], 0)
    assert got.tokens == {}


def test_completions_without_tokens_are_dropped() -> None:
    """The best of the first group, all of the second."""
    got = SUPERHF.lesson(SuperHFConfig(keep=2), dataclasses.replace(SEEN, lengths=torch.tensor([1, 0, 1, 0, 0, 0])))
    assert got.keep.tolist() == [True, False, True, False, False, False]
    same(got.metrics["reward/kept"], [0.0, 1.0], 0)


def test_the_loss_by_hand() -> None:
    one = Completions(
        logps=tensor([-1.0, -2.0, -0.5]), lengths=torch.tensor([2, 1]), more={"forward_kl": tensor([0.1, 0.3, 0.6])}
    )
    loss = SUPERHF(SuperHFConfig(beta=0.5), Kept(completion=one))
    assert loss.per == "completion" and loss.plus is None
    same(loss.values, [1.05, 2.15, 0.8], 1e-12)
    released = SUPERHF(SuperHFConfig(beta=0.5, kl_reduction="examples", minibatch=4), Kept(completion=one))
    same(released.values, [1.0, 2.0, 0.5], 0)
    same(released.plus.values, [4 * 0.5 * 0.2, 4 * 0.5 * 0.6], 1e-12)
    assert released.plus.per == "row"
    alone = SUPERHF(SuperHFConfig(beta=0.0), Kept(completion=dataclasses.replace(one, more={})))
    same(alone.values, [1.0, 2.0, 0.5], 0)


def test_the_direction_of_the_kl() -> None:
    """KL(reference || policy), with the gradient that comes of it: policy minus reference, beside the cross-entropy's."""
    settings = SuperHFConfig(beta=0.7)
    one = random_statistics(Kept, want=SUPERHF.want(settings)).completion
    p, q = one.policy.softmax(-1), one.reference.softmax(-1)
    same(one["forward_kl"], (q * (q.log() - p.log())).sum(-1).tolist(), 1e-12)
    (gradient,) = torch.autograd.grad(SUPERHF(settings, Kept(completion=one)).values.sum(), one.policy)
    hot = torch.nn.functional.one_hot(one.targets, p.shape[1])
    same(gradient, ((p - hot) + 0.7 * (p - q)).tolist(), 1e-12)


def test_without_a_kl_no_reference_is_read() -> None:
    assert SUPERHF.reads_reference(SuperHFConfig()) and not SUPERHF.reads_reference(SuperHFConfig(beta=0.0))
    assert SUPERHF.want(SuperHFConfig(beta=0.0)) == ()
    (want,) = SUPERHF.want(SuperHFConfig())
    assert want.name == "forward_kl" and want.eager
    logits = torch.randn(2, 3, 5, dtype=torch.float64)
    named = by_definition(*logits, torch.tensor([0, 1, 2]), [want])["forward_kl"]
    torch.testing.assert_close(named, by_definition(*logits, torch.tensor([0, 1, 2]), ["forward_kl"])["forward_kl"])


def test_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="minibatch is for kl_reduction = examples"):
        parse(SuperHFConfig, {"minibatch": 8}, "objective")
    with pytest.raises(UserError, match="group_size = 3"):
        SUPERHF.lesson(SuperHFConfig(keep=3), SEEN)
