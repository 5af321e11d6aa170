"""AKL: the authors' numbers, the paper's head by an independent sort, heads of every size, ties, and equal models."""

from __future__ import annotations

import math

import pytest
import torch
from golden import close, tensor
from golden_taught import taught, taught_golden

from posttrain.objectives.distillation import akl as module
from posttrain.objectives.distillation.akl import AKLConfig, akl
from posttrain.registry import find
from posttrain.stats import Loss

AKL = find("akl")


def by_sorting(student: torch.Tensor, teacher: torch.Tensor, mu: float, *, released: bool) -> dict[str, torch.Tensor]:
    """The definition, token by token on sorted lists; values, weights, heads."""
    found: dict[str, list[torch.Tensor]] = {"value": [], "w_head": [], "head_size": []}
    for z, zt in zip(student, teacher, strict=True):
        q, p = z.softmax(0), zt.softmax(0)
        order = sorted(range(len(p)), key=lambda v: (-p[v].item(), v))
        head, mass = [], 0.0
        for v in order:
            crosses = mass + p[v].item() > mu if released else mass >= mu
            if crosses and head:
                break
            head.append(v)
            mass += p[v].item()
        gap = (p - q).abs().detach()
        w = gap[head].sum() / gap.sum()
        value = w * (p * (p / q).log()).sum() + (1 - w) * (q * (q / p).log()).sum()
        for name, one in zip(found, (value, w, torch.tensor(len(head))), strict=True):
            found[name].append(one)
    return {name: torch.stack(values) for name, values in found.items()}


def run(student: torch.Tensor, teacher: torch.Tensor, config: AKLConfig) -> Loss:
    targets = torch.zeros(len(student), dtype=torch.int64)
    return akl(config, taught(student, teacher, targets, AKL.want(config)))


def logits(n: int, size: int, seed: int, spread: float) -> torch.Tensor:
    return spread * torch.randn(n, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_golden_of_the_released_head() -> None:
    file = taught_golden("akl_official_mu0.5")
    loss = file.agree(AKL, AKLConfig(head="released"), atol=1e-8)
    weights = file.outputs["weights"]
    close(loss.metrics["head_size"], tensor(weights["head_size"])[file.mask].tolist())
    total = tensor(weights["g_head"]) + tensor(weights["g_tail"])
    close(loss.metrics["w_head"], (tensor(weights["g_head"]) / total)[file.mask].tolist(), 1e-8)


@pytest.mark.parametrize("head", ["paper", "released"])
@pytest.mark.parametrize("mu", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize(("size", "spread"), [(23, 2.0), (300, 1.5), (300, 0.1)])
def test_heads_by_sorting(size: int, spread: float, mu: float, head: str) -> None:
    """300 nearly equally likely items have heads beyond the 64 that are looked at first."""
    student, teacher = logits(6, size, 1, spread).requires_grad_(), logits(6, size, 2, spread)
    expected = by_sorting(student, teacher, mu, released=head == "released")
    loss = run(student, teacher, AKLConfig(mu=mu, head=head))
    close(loss.values, expected["value"].tolist(), 1e-12)
    close(loss.metrics["w_head"], expected["w_head"].tolist(), 1e-12)
    close(loss.metrics["head_size"], expected["head_size"].tolist())
    ours, theirs = (torch.autograd.grad(values.mean(), student)[0] for values in (loss.values, expected["value"]))
    close(ours, theirs.tolist(), 1e-12)


def test_some_heads_are_looked_at_further() -> None:
    flat, peaked = logits(3, 3000, 2, 0.1), logits(3, 3000, 3, 8.0)
    loss = run(logits(6, 3000, 1, 1.0), torch.cat([flat[:1], peaked, flat[1:]]), AKLConfig(mu=0.5))
    beyond = loss.metrics["head_size"] > module._LOOKED_AT[1]
    assert beyond.tolist() == [True, False, False, False, True, True]


def test_the_two_heads_of_the_file_differ_as_measured() -> None:
    file = taught_golden("akl_official_mu0.5")
    values = [
        akl(AKLConfig(head=head), file.taught(AKL.want(AKLConfig(head=head)))).values.mean() for head in ("paper", "released")
    ]
    assert [round(value.item(), 5) for value in values] == [1.09099, 1.10324]


def test_by_hand() -> None:
    """Teacher (1/2, 1/4, 1/4), student (1/4, 1/2, 1/4), mu 1/2: the head is the first item, both gaps are 1/4.

    So w_head = 1/2 in either head: the released running sum 1/2 does not pass mu. The KLs are (1/4) log 2 both ways.
    """
    teacher, student = (torch.tensor([row], dtype=torch.float64).log() for row in ([0.5, 0.25, 0.25], [0.25, 0.5, 0.25]))
    for head in ("paper", "released"):
        loss = run(student, teacher, AKLConfig(head=head))
        assert loss.values.item() == pytest.approx(math.log(2) / 4, abs=1e-12)
        assert loss.metrics["w_head"].item() == pytest.approx(0.5) and loss.metrics["head_size"].item() == 1


@pytest.mark.parametrize("mu", [0.3, 0.6])
def test_equally_likely_items_enter_in_the_order_of_their_ids(mu: float) -> None:
    """Of 100 equally likely items the first 30 or 60 are the head; of the gaps those of exactly these count."""
    student, teacher = logits(2, 100, 1, 1.0), torch.zeros(2, 100, dtype=torch.float64)
    mu -= 1e-9
    loss = run(student, teacher, AKLConfig(mu=mu))
    count = round(100 * mu)
    gap = (student.softmax(-1) - 0.01).abs()
    assert loss.metrics["head_size"].tolist() == [count, count]
    close(loss.metrics["w_head"], (gap[:, :count].sum(-1) / gap.sum(-1)).tolist(), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_models(dtype: torch.dtype) -> None:
    """No gap to weigh: w_head is 1/2, value and gradient are 0 (the authors' code gives nan)."""
    student = logits(4, 50, 1, 2.0).to(dtype).requires_grad_()
    loss = run(student, student.detach().clone(), AKLConfig())
    (gradient,) = torch.autograd.grad(loss.values.sum(), student)
    assert loss.values.abs().max() == 0 and gradient.abs().max() < 1e-7
    assert loss.metrics["w_head"].tolist() == [0.5] * 4


def test_at_the_least_log_probs() -> None:
    """float32 at the floor of the kernel, -1e4: finite."""
    lp = torch.tensor([[0.0, -1e4, -1e4], [-1e4, 0.0, -1e4]], requires_grad=True)
    (want,) = AKL.want(AKLConfig())
    value, w, size = want.f(lp, torch.tensor([[-1e4, 0.0, -1e4], [-1e4, 0.0, -1e4]]), None)
    (gradient,) = torch.autograd.grad(value.sum(), lp)
    assert value.isfinite().all() and gradient.isfinite().all()
    assert value[1].item() == 0 and w.tolist() == [0.5, 0.5] and size.tolist() == [1, 1]


def test_the_weights_have_no_gradient() -> None:
    """With the weights as constants the loss is linear in the KLs; the golden gradient says the same of the authors' code."""
    student, teacher = logits(5, 40, 1, 1.0).requires_grad_(), logits(5, 40, 2, 1.0)
    loss = run(student, teacher, AKLConfig())
    w = loss.metrics["w_head"]
    q, p = student.log_softmax(-1), teacher.log_softmax(-1)
    constant = w * (p.exp() * (p - q)).sum(-1) + (1 - w) * (q.exp() * (q - p)).sum(-1)
    ours, theirs = (torch.autograd.grad(values.sum(), student)[0] for values in (loss.values, constant))
    close(ours, theirs.tolist(), 1e-12)


def test_cross_entropy_is_added() -> None:
    file = taught_golden("akl_official_mu0.5")
    statistics = file.taught(AKL.want(AKLConfig()))
    mixed = akl(AKLConfig(ce_weight=0.25), statistics).values
    close(mixed, (akl(AKLConfig(), statistics).values - 0.25 * statistics.completion.logps).tolist(), 1e-12)
    assert AKL.start(AKLConfig()) == 0.0 and AKL.start(AKLConfig(ce_weight=0.25)) is None
