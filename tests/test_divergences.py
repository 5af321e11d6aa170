"""Every divergence: value, derivative, limits, and what happens at log-ratios of a thousand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from posttrain.divergences import DIVERGENCES, FAMILIES, DivergenceName, LinkName, choices, divergence

PARAMETERS = ("0.001", "0.1", "0.3", "0.5", "0.7", "0.9", "0.999")
NAMES = [*DIVERGENCES, *(f"{family}:{parameter}" for family in FAMILIES for parameter in PARAMETERS)]
LINKED = [name for name in NAMES if divergence(name).link is not None]

GENERATORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "reverse_kl": lambda u: u * u.log(),
    "forward_kl": lambda u: -u.log(),
    "js": lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
    "jeffreys": lambda u: (u - 1) * u.log(),
    "squared_hellinger": lambda u: (u.sqrt() - 1).square(),
    "chi2_kl": lambda u: (u - 1).square() / 2 + u * u.log(),
    "chi2": lambda u: (u - 1).square(),
    "total_variation": lambda u: (u - 1).abs() / 2,
    **{
        f"jsd:{b}": lambda u, b=float(b): -b * (b + (1 - b) * u).log() + (1 - b) * u * (u / (b + (1 - b) * u)).log()
        for b in PARAMETERS
    },
    **{f"skew_kl:{a}": lambda u, a=float(a): -(a + (1 - a) * u).log() for a in PARAMETERS},
    **{
        f"skew_reverse_kl{end}:{a}": lambda u, a=float(a): u * (u / (1 - a + a * u)).log()
        for a in PARAMETERS
        for end in ("", "_detached")
    },
    **{f"alpha:{a}": lambda u, a=float(a): (u ** (1 - a) - (1 - a) * u - a) / (a * (a - 1)) for a in PARAMETERS},
}
"""f(u) as printed in the papers; D = E_reference f(policy / reference)."""


def distributions(seed: int = 0, spread: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Two [6, 11] float64 log-distributions."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: (spread * torch.randn(6, 11, generator=generator, dtype=torch.float64)).log_softmax(-1)  # noqa: E731
    return draw(), draw()


def distance(name: str, lp: torch.Tensor, lq: torch.Tensor) -> torch.Tensor:
    return divergence(name).summand(lp, lq).sum(-1)


@pytest.mark.parametrize("name", [name for name in NAMES if name in GENERATORS])
def test_is_the_expectation_of_the_printed_generator(name: str) -> None:
    lp, lq = distributions()
    expected = (lq.exp() * GENERATORS[name]((lp - lq).exp())).sum(-1)
    torch.testing.assert_close(distance(name, lp, lq), expected, rtol=1e-9, atol=1e-9)


def test_by_hand() -> None:
    """policy (3/4, 1/4), reference (1/4, 3/4): every logarithm is +-log 3.

    KLs: 3/4 log 3 - 1/4 log 3 = log(3) / 2 both ways, so Jeffreys is log 3. JS (twice the usual one): the middle is 1/2, so
    2 * (3/4 log(3/2) + 1/4 log(1/2)) = 3/2 log 3 - 2 log 2. Total variation: 1/2. chi2: 1/4 * 4 + 3/4 * 4/9 = 4/3.
    alpha 1/2: 2 * (2 - 2 * 2 * sqrt(3) / 4) = 4 - 2 sqrt(3).
    """
    lp = torch.tensor([0.75, 0.25], dtype=torch.float64).log()
    expected = {
        "reverse_kl": math.log(3) / 2,
        "forward_kl": math.log(3) / 2,
        "jeffreys": math.log(3),
        "js": 1.5 * math.log(3) - 2 * math.log(2),
        "total_variation": 0.5,
        "chi2": 4 / 3,
        "alpha:0.5": 4 - 2 * math.sqrt(3),
    }
    assert {name: round(distance(name, lp, lp.flip(0)).item(), 12) for name in expected} == {
        name: round(value, 12) for name, value in expected.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_zero_where_equal_and_positive_elsewhere(name: str) -> None:
    lp, lq = distributions()
    assert distance(name, lp, lp).abs().max() < 1e-12
    assert (distance(name, lp, lq) > 1e-8).all()


@pytest.mark.parametrize("name", [name for name in NAMES if "detached" not in name])
def test_summand_gradcheck(name: str) -> None:
    lp, lq = (row[0].clone().requires_grad_() for row in distributions())
    assert torch.autograd.gradcheck(divergence(name).summand, (lp, lq))


@pytest.mark.parametrize("name", [name for name in NAMES if divergence(name).slope])
def test_slope_is_the_derivative_of_the_summand(name: str) -> None:
    lp, lq = distributions(spread=3.0)
    lp.requires_grad_()
    entry = divergence(name)
    (gradient,) = torch.autograd.grad(entry.summand(lp, lq).sum(), lp)
    torch.testing.assert_close(entry.slope(lp.detach(), lq), gradient, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_finite_at_the_least_log_probs(name: str) -> None:
    """-1e4 is where the kernel puts log-probs of -inf; float32. The two chi2 are infinite there."""
    if name.startswith("chi2"):
        pytest.skip("infinite")
    lp, lq = torch.tensor([0.0, -1e4, -1e4, -1e4]), torch.tensor([-1e4, 0.0, -1e4, -20.0])
    leaf = lp.clone().requires_grad_()
    value = divergence(name).summand(leaf, lq)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    assert value.isfinite().all() and gradient.isfinite().all()
    if divergence(name).slope:
        torch.testing.assert_close(divergence(name).slope(lp, lq), gradient)


def test_the_detached_mixture_has_the_same_value_and_another_slope() -> None:
    lp, lq = distributions()
    one, other = divergence("skew_reverse_kl:0.1"), divergence("skew_reverse_kl_detached:0.1")
    torch.testing.assert_close(other.summand(lp, lq), one.summand(lp, lq), rtol=0, atol=0)
    mixture = (0.9 * lq.exp() + 0.1 * lp.exp()).log()
    torch.testing.assert_close(other.slope(lp, lq), lp.exp() * (lp - mixture + 1), rtol=1e-12, atol=1e-14)
    assert (other.slope(lp, lq) - one.slope(lp, lq)).abs().max() > 0.05


@pytest.mark.parametrize("name", LINKED)
def test_link_is_the_derivative_of_the_summand(name: str) -> None:
    """d summand / d log policy = policy * f'(u), whatever policy and reference make up u; the link is f' with 0 at u = 1."""
    entry = divergence(name)
    lp, lq = distributions(spread=3.0)
    lp.requires_grad_()
    (gradient,) = torch.autograd.grad(entry.summand(lp, lq).sum(), lp)
    at_one = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (f_prime_at_one,) = torch.autograd.grad(entry.summand(at_one, torch.zeros((), dtype=torch.float64)), at_one)
    f_prime = gradient / lp.detach().exp()
    torch.testing.assert_close(f_prime - f_prime_at_one, entry.link((lp - lq).detach()), rtol=1e-9, atol=1e-9)
    assert entry.link(torch.zeros(1, dtype=torch.float64)).item() == 0


@pytest.mark.parametrize("name", LINKED)
def test_score_is_strictly_increasing(name: str) -> None:
    h = torch.linspace(-40, 40, 401, dtype=torch.float64, requires_grad=True)
    score = divergence(name).score(h)
    (slope,) = torch.autograd.grad(score.sum(), h)
    assert (slope > 0).all()
    assert (score.diff() > 0).all()


@pytest.mark.parametrize("name", LINKED)
def test_score_gradcheck(name: str) -> None:
    h = torch.tensor([-19.0, -3.0, -0.2, 0.0, 0.4, 2.0, 6.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(divergence(name).score, (h,))


@pytest.mark.parametrize("name", LINKED)
@pytest.mark.parametrize("edge", [-20.0, 20.0])
def test_continuation_is_linear_with_the_slope_at_the_edge(name: str, edge: float) -> None:
    entry, beyond = divergence(name), math.copysign(1, edge)
    h = (edge + beyond * torch.tensor([-1e-6, 0.0, 1e-6, 1.0, 980.0], dtype=torch.float64)).requires_grad_()
    score = entry.score(h)
    (slope,) = torch.autograd.grad(score.sum(), h)
    torch.testing.assert_close(score[:2], entry.link(h)[:2], rtol=1e-14, atol=0)
    torch.testing.assert_close(slope, slope[1].expand(5), rtol=2e-6, atol=0)
    torch.testing.assert_close(score, score[1] + slope[1] * (h - edge), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LINKED)
def test_score_at_a_thousand(name: str, dtype: torch.dtype) -> None:
    """Finite, right to float32's precision, and with a gradient that is neither 0 nor infinite and itself right."""
    values = [-1000.0, -512.0, -100.0, -20.0, -18.0, -5.0, 0.0, 5.0, 18.0, 20.0, 100.0, 512.0, 1000.0]
    h = torch.tensor(values, dtype=dtype, requires_grad=True)
    exact = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    score, truth = divergence(name).score(h), divergence(name).score(exact)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score.double(), truth, rtol=3e-6, atol=1e-6)
    (slope,) = torch.autograd.grad(score.sum(), h)
    (expected,) = torch.autograd.grad(truth.sum(), exact)
    assert slope.isfinite().all() and (slope > 0).all()
    torch.testing.assert_close(slope.double(), expected, rtol=5e-6 if dtype == torch.float32 else 4e-3, atol=0)


def test_continued_marks_what_is_beyond_20() -> None:
    h = torch.tensor([-1000.0, -20.5, -20.0, 0.0, 20.0, 20.5, 1000.0], requires_grad=True)
    continued = divergence("js").continued(h)
    assert continued.tolist() == [1, 1, 0, 0, 0, 1, 1]
    assert not continued.requires_grad


@pytest.mark.parametrize(("limit", "near"), [("reverse_kl", lambda e: e), ("forward_kl", lambda e: 1 - e)])
def test_alpha_goes_to_its_limits_linearly(limit: str, near: Callable[[float], float]) -> None:
    lp, lq = distributions()
    h = torch.linspace(-3, 3, 13, dtype=torch.float64)
    error, link_error = (
        [(of(f"alpha:{near(step)}") - of(limit)).abs().max().item() for step in (1e-3, 1e-4)]
        for of in (lambda name: distance(name, lp, lq), lambda name: divergence(name).link(h))
    )
    assert error[0] < 0.02 and link_error[0] < 0.1
    assert error[1] / error[0] == pytest.approx(0.1, rel=0.02)
    assert link_error[1] / link_error[0] == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize("a", [0.1, 0.3, 0.5])
def test_alpha_exchanges_policy_and_reference(a: float) -> None:
    """D_a(policy || reference) = D_{1 - a}(reference || policy); at 1/2 it is its own mirror."""
    lp, lq = distributions()
    torch.testing.assert_close(distance(f"alpha:{a}", lp, lq), distance(f"alpha:{1 - a}", lq, lp), rtol=1e-10, atol=1e-12)


RELATIONS: dict[str, dict[str, float]] = {
    "jeffreys": {"reverse_kl": 1, "forward_kl": 1},
    "squared_hellinger": {"alpha:0.5": 0.5},
    "js": {"jsd:0.5": 2},
    "chi2_kl": {"chi2": 0.5, "reverse_kl": 1},
}
"""Name -> the weighted sum of others that it is."""


@pytest.mark.parametrize("name", [name for name in RELATIONS if name in DIVERGENCES])
def test_is_a_sum_of_others(name: str) -> None:
    lp, lq = distributions()
    expected = sum(weight * distance(other, lp, lq) for other, weight in RELATIONS[name].items())
    torch.testing.assert_close(distance(name, lp, lq), expected, rtol=1e-10, atol=1e-12)


def test_js_is_twice_the_usual_one_and_bounded() -> None:
    far = torch.tensor([[0.0, -200.0]], dtype=torch.float64)
    assert distance("js", far, far.flip(-1)).item() == pytest.approx(2 * math.log(2), abs=1e-12)
    assert divergence("js").link(torch.tensor(15.0, dtype=torch.float64)).item() == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize(("b", "limit", "scale"), [(1e-4, "forward_kl", 1e4), (1 - 1e-4, "reverse_kl", 1e4)])
def test_jsd_vanishes_towards_its_ends_as_a_kl(b: float, limit: str, scale: float) -> None:
    lp, lq = distributions()
    torch.testing.assert_close(scale * distance(f"jsd:{b}", lp, lq), distance(limit, lp, lq), rtol=5e-3, atol=0)


@pytest.mark.parametrize(("name", "limit"), [("skew_kl", "forward_kl"), ("skew_reverse_kl", "reverse_kl")])
def test_skewed_kl_goes_to_the_kl(name: str, limit: str) -> None:
    lp, lq = distributions()
    torch.testing.assert_close(distance(f"{name}:1e-6", lp, lq), distance(limit, lp, lq), rtol=1e-3, atol=0)


def test_choices_are_what_a_user_may_write() -> None:
    families = ["alpha:<a>", "jsd:<b>", "skew_kl:<a>", "skew_reverse_kl:<a>", "skew_reverse_kl_detached:<a>"]
    assert choices() == [*DIVERGENCES, *families]
    assert set(choices()) - set(choices(link=True)) == {"total_variation", "chi2", *families[1:]}


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("jsd:0", "forward_kl, the limit of jsd:<b> / b, is meant by jsd:0"),
        ("jsd:1", "reverse_kl, the limit of jsd:<b> / (1 - b), is meant by jsd:1"),
        ("skew_kl:0", "forward_kl is meant by skew_kl:0"),
        ("skew_reverse_kl_detached:0.0", "reverse_kl is meant by skew_reverse_kl_detached:0"),
    ],
)
def test_the_ends_are_pointed_to(name: str, end: str) -> None:
    with pytest.raises(ValueError, match="takes its parameter after a colon") as error:
        divergence(name)
    assert str(error.value).endswith(f"; {end}")


@pytest.mark.parametrize("name", ["alpha", "alpha:", "alpha:0", "alpha:1", "alpha:1.5", "alpha:-0.5", "alpha:x", "alpha:nan"])
def test_alpha_outside_the_open_unit_interval(name: str) -> None:
    with pytest.raises(ValueError, match=r"^alpha takes its parameter after a colon, 0 < a < 1, for example alpha:0\.5$"):
        divergence(name)


@pytest.mark.parametrize(("name", "suggestion"), [("revers_kl", "; did you mean reverse_kl?"), ("js:0.5", "."), ("qqq", ".")])
def test_unknown_name_lists_the_choices(name: str, suggestion: str) -> None:
    with pytest.raises(ValueError) as error:
        divergence(name)
    assert str(error.value) == f"unknown divergence{suggestion} Possible: {', '.join(choices())}"


@pytest.mark.parametrize("name", [name for name in NAMES if name not in LINKED])
def test_a_setting_with_a_link_refuses_those_without(name: str) -> None:
    assert TypeAdapter(DivergenceName).validate_python(name) == name
    reason = divergence(name).refused
    assert reason
    with pytest.raises(ValidationError) as error:
        TypeAdapter(LinkName).validate_python(name)
    expected = f"Value error, not defined for preference learning: {reason}. Possible: {', '.join(choices(link=True))}"
    assert error.value.errors()[0]["msg"] == expected
