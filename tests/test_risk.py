"""Measures of risk against numbers worked by hand, a float64 reference that sorts, and their own inequalities."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from golden import close, golden, tensor
from heads import peak_bytes, stats_and_gradients
from posttrain_kernels import Rowwise
from torch import Tensor

from posttrain import risk

FLOOR = -1e4
"""What the kernel makes of the log-prob of an item that a model excludes."""

LEVELS = (1e-3, 0.05, 0.3, 0.5, 0.97, 0.999, 1.0)

MEASURES = {
    "cvar_upper": partial(risk.cvar_upper, mu=0.6),
    "cvar_lower": partial(risk.cvar_lower, mu=0.6),
    "erm_upper": partial(risk.erm_upper, mu=5.0),
    "erm_lower": partial(risk.erm_lower, mu=0.5),
    "erm_lower, negative": partial(risk.erm_lower, mu=5.0),
    "official": partial(risk.official, level=0.6, split=False),
    "official, split": partial(risk.official, level=0.6, split=True),
}

every_measure = pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)


def rows(
    n: int = 6,
    size: int = 40,
    *,
    apart: float = 1.0,
    ties: bool = False,
    floors: bool = False,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Random lp and lq; with `ties` many items have the same Z, with `floors` each model excludes some items of its own."""
    draw = partial(torch.randn, n, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    lp = (2 * draw()).log_softmax(-1)
    z = apart * draw()
    lq = (lp + (z.round() if ties else z)).log_softmax(-1)
    if floors:
        lp, lq = (one.masked_fill(draw() > 1, FLOOR) for one in (lp, lq))
    return lp.to(dtype), lq.to(dtype)


def by_sorting(lp: Tensor, lq: Tensor, mu: float, *, upper: bool) -> Tensor:
    """cvar in float64: the masses in order of Z, as much of each as still fits into mu."""
    z, q = (lq.double() - lp.double()), lq.double().exp()
    z, order = z.sort(1, descending=upper)
    q = q.gather(1, order)
    before = q.cumsum(1) - q
    taken = (mu * q.sum(1, keepdim=True) - before).clamp(min=0).minimum(q)
    return (taken * z).sum(1) / mu


def test_by_hand() -> None:
    """q = (0.5, 0.3, 0.2), p = (0.25, 0.6, 0.15), so Z = (log 2, -log 2, log 4/3): from the top items 0, 2, 1.

    The share 0.6 takes all of item 0 and half of item 2 (0.1); the lower share 0.4 all of item 1 and half of item 2. The median
    of the three Z is log 4/3, above which is item 0 only; of the halves (0) and (1, 2), nothing is above itself, and item 2 is
    above the middle of items 1 and 2.
    """
    lp, lq = tensor([[0.25, 0.6, 0.15]]).log().requires_grad_(), tensor([[0.5, 0.3, 0.2]]).log()
    two, third = math.log(2), math.log(4 / 3)
    expected = [
        (risk.kl(lp, lq), 0.2 * two + 0.2 * third, [-0.5, -0.3, -0.2]),
        (risk.cvar_upper(lp, lq, 0.6), (0.5 * two + 0.1 * third) / 0.6, [-5 / 6, 0, -1 / 6]),
        (risk.cvar_lower(lp, lq, 0.4), (-0.3 * two + 0.1 * third) / 0.4, [0, -0.75, -0.25]),
        (risk.erm_upper(lp, lq, 1.0), math.log(17 / 12), [-12 / 17, -9 / 85, -16 / 85]),
        (risk.erm_lower(lp, lq, 1.0), 0.0, [-0.25, -0.6, -0.15]),
        (risk.erm_lower(lp, lq, 0.5), -2 * math.log(math.sqrt(0.125) + math.sqrt(0.18) + math.sqrt(0.03)), None),
        (risk.official(lp, lq, 0.5, False), 0.5 * two, [-0.5, 0, 0]),
        (risk.official(lp, lq, 0.5, True), 0.2 * third, [0, 0, -0.2]),
    ]
    for got, value, slope in expected:
        close(got, [value], 1e-14)
        if slope is not None:
            close(torch.autograd.grad(got.sum(), lp)[0], [slope], 1e-14)


@pytest.mark.parametrize("mu", LEVELS)
@pytest.mark.parametrize("upper", [True, False])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_cvar_is_what_sorting_gives(mu: float, upper: bool, dtype: torch.dtype, rtol: float) -> None:
    """Relative to the size of Z: what rounding the masses moves across the quantile is that large."""
    measure = risk.cvar_upper if upper else risk.cvar_lower
    for size, apart, ties, floors in itertools.product((1, 2, 3, 50, 5000), (0.0, 0.01, 1.0), (False, True), (False, True)):
        lp, lq = rows(size=size, apart=apart, ties=ties, floors=floors, dtype=dtype)
        expected = by_sorting(lp, lq, mu, upper=upper)
        scale = expected.abs() + 0.01 * (lq - lp).abs().amax(1) + 1e-3
        assert ((measure(lp, lq, mu).double() - expected).abs() <= rtol * scale).all(), (size, apart, ties, floors)


@pytest.mark.parametrize("upper", [True, False])
def test_several_items_at_the_quantile_count_in_the_same_proportion(upper: bool) -> None:
    """Z = 1, 1/2, 1/2, 0 to the last bit (or negated), and a share that takes the first and a third of the next two."""
    lq, z = tensor([[-2.0, -1.5, -1.0, -0.75]]), tensor([[1.0, 0.5, 0.5, 0.0]])
    q = lq.exp().squeeze()
    mass = q[0] + (q[1] + q[2]) / 3
    lp = (lq - (z if upper else -z)).requires_grad_()
    value = (risk.cvar_upper if upper else risk.cvar_lower)(lp, lq, float(mass / q.sum()))
    close(torch.autograd.grad(value.sum(), lp)[0], [(-q * tensor([1, 1 / 3, 1 / 3, 0]) * q.sum() / mass).tolist()], 1e-14)
    close(value.abs(), [float((q[0] + (q[1] + q[2]) / 6) * q.sum() / mass)], 1e-14)


def test_differences_at_the_end_of_float32_are_differences() -> None:
    lp = -torch.arange(4.0)[None] * 1e-42
    (gradient,) = torch.autograd.grad(risk.cvar_upper(lp.requires_grad_(), torch.zeros(1, 4), 0.5).sum(), lp)
    assert gradient.tolist() == [[0, 0, -2, -2]]


@every_measure
@pytest.mark.parametrize("floors", [False, True])
def test_gradcheck(measure: Callable, floors: bool) -> None:
    lp, lq = rows(n=2, size=9)
    if floors:
        lp[0, 1] = lq[1, 2] = FLOOR
    assert torch.autograd.gradcheck(lambda lp: measure(lp, lq), lp.requires_grad_(), atol=1e-4 if floors else 1e-7)


def test_the_level_orders_them() -> None:
    """Upper measures are not below the KL, lower ones not above; more risk averse is larger, or smaller below."""
    lp, lq = rows(n=50)
    kl = risk.kl(lp, lq)
    levels = [0.05, 0.3, 0.6, 0.9, 0.99]
    chains = [
        *[[measure(lp, lq, mu) for mu in levels] for measure in (risk.cvar_lower, risk.erm_upper)],
        *[[measure(lp, lq, mu) for mu in reversed(levels)] for measure in (risk.cvar_upper, risk.erm_lower)],
    ]
    for chain, upper in zip(chains, (False, True, True, False), strict=True):
        for smaller, larger in itertools.pairwise(chain):
            assert (smaller <= larger + 1e-12).all() and smaller.mean() < larger.mean()
        assert (chain[0] > kl).all() if upper else (chain[-1] < kl).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_limits_are_the_kl(dtype: torch.dtype) -> None:
    lp, lq = rows(dtype=dtype, size=3000, apart=0.1)
    kl = risk.kl(lp, lq)
    assert torch.equal(risk.cvar_upper(lp, lq, 1.0), kl) and torch.equal(risk.cvar_lower(lp, lq, 1.0), kl)
    for mu in (1e-6, 1e-9):
        for measure in (risk.erm_upper, risk.erm_lower):
            torch.testing.assert_close(measure(lp, lq, mu), kl, rtol=1e-5, atol=0)
    lower = risk.official(lp, lq, 1 - 1e-9, False) - kl  # drops the one item with the smallest Z
    smallest = (lq - lp).min(1)
    torch.testing.assert_close(lower, -(lq.gather(1, smallest.indices[:, None]).squeeze(1).exp() * smallest.values))


@pytest.mark.parametrize("mu", [0.3, 5.0])
def test_entropic_risk_is_a_renyi_divergence(mu: float) -> None:
    lp, lq = rows()

    def renyi(order: float, lp: Tensor, lq: Tensor) -> Tensor:
        return (order * lp + (1 - order) * lq).exp().sum(1).log() / (order - 1)

    torch.testing.assert_close(risk.erm_upper(lp, lq, mu), renyi(1 + mu, lq, lp))
    torch.testing.assert_close(risk.erm_lower(lp, lq, mu), renyi(1 - mu, lq, lp))
    torch.testing.assert_close(risk.erm_lower(lp, lq, mu), (1 - mu) / mu * renyi(mu, lp, lq))


@pytest.mark.parametrize("mu", [1e-6, 1e-3, 0.1, 1.0, 9.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_entropic_risk_in_float32(mu: float, sign: int) -> None:
    """Against float64 and the definition in log space, which float64 affords; near and far from the KL."""
    for apart in (0.01, 1.0, 5.0):
        lp, lq = rows(size=500, apart=apart, dtype=torch.float32)
        expected = torch.logsumexp((1 + sign * mu) * lq.double() - sign * mu * lp.double(), 1) - torch.logsumexp(lq.double(), 1)
        got = (risk.erm_upper if sign > 0 else risk.erm_lower)(lp, lq, mu)
        torch.testing.assert_close(got.double(), sign * expected / mu, rtol=1e-5, atol=1e-6)


@every_measure
def test_nothing_at_policy_equal_to_reference(measure: Callable) -> None:
    _, lq = rows(dtype=torch.float32, floors=True)
    assert (measure(lq, lq) == 0).all()


@every_measure
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_excluded_items_are_safe(measure: Callable, dtype: torch.dtype) -> None:
    lp, lq = rows(floors=True, dtype=dtype)
    value = measure(lp.requires_grad_(), lq)
    (gradient,) = torch.autograd.grad(value.sum(), lp)
    assert value.isfinite().all() and gradient.isfinite().all()
    assert (gradient <= 0).all()


@every_measure
def test_rows_do_not_know_of_each_other(measure: Callable) -> None:
    """Neither their number nor a row that is broken."""
    lp, lq = rows(n=400, size=3000, dtype=torch.float32)  # more than a block
    value = measure(lp, lq)
    assert torch.equal(value[7:30], measure(lp[7:30], lq[7:30])) and torch.equal(value[399:], measure(lp[399:], lq[399:]))
    lp[3] = torch.nan
    broken = measure(lp, lq)
    assert broken[3].isnan() and torch.equal(broken[:3], value[:3]) and torch.equal(broken[4:], value[4:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("split", [False, True])
def test_official_has_the_threshold_of_torch_to_the_last_bit(dtype: torch.dtype, split: bool) -> None:
    for size, level in itertools.product((2, 7, 100, 1001), (0.95, 0.6, 0.5, 0.123)):
        lp, lq = rows(size=size, dtype=dtype, ties=size == 100)
        z, cuts = lq - lp, [0, size // 2, size] if split else [0, size]
        masks = [z[:, a:b] > torch.quantile(z[:, a:b], 1 - level, dim=1, keepdim=True) for a, b in itertools.pairwise(cuts)]
        expected = (lq.exp() * torch.cat(masks, 1) * z).sum(1)
        assert torch.equal(risk.official(lp, lq, level, split), expected), (size, level)


def test_the_paper_s_measures_on_every_position_of_a_golden_file() -> None:
    file = golden("radpo_paper_risk_measures")
    lp, lq = (one[:, :-1].flatten(0, 1).log_softmax(-1) for one in (file.policy_logits, tensor(file.inputs["ref_logits"])))
    found = {"kl_ref_pi": risk.kl(lp, lq), "erm_readme_5": -risk.erm_lower(lp, lq, 5.0)}
    for name in file.outputs.keys() - found.keys():
        measure, _, mu = name.rpartition("_")
        found[name] = vars(risk)[measure](lp, lq, float(mu))
    for name, value in found.items():
        close(value, tensor(file.outputs[name]["per_token"]).flatten().tolist())


@pytest.mark.parametrize("name", ["cvar_upper", "erm_upper", "official, split"])
def test_memory_through_the_kernel_is_the_workspace(name: str) -> None:
    """Whatever the number of tokens: values and gradients without an [N, V] tensor."""
    v, workspace = 10_000, 4 << 20
    want = [Rowwise("risk", lambda lp, lq, target: MEASURES[name](lp, lq))]
    peaks = {n: peak_bytes(stats_and_gradients(n, v, want, workspace, frozen=False)) for n in (256, 512)}
    assert peaks[512] <= 4 * v * 16 + 4 * 512 * (2 * 16 + 60) + 3.25 * workspace
    assert peaks[512] - peaks[256] <= 4 * 256 * (2 * 16 + 60)  # dx and vectors, no multiple of V
    assert peaks[512] < 4 * 512 * v
