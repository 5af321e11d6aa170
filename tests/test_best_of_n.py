"""KL of best-of-n: the estimate against enumeration, the bound, and its extremes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from posttrain.best_of_n import distribution, kl_bound, kl_estimates, win_rate_bound

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "t2_bon_kl.json").read_text())


@pytest.mark.parametrize("row", GOLDEN["rows"], ids=lambda row: str(row["n"]))
def test_golden(row: dict[str, float]) -> None:
    reference = torch.tensor(GOLDEN["pmf"], dtype=torch.float64)
    ranks = {outcome: rank for rank, outcome in enumerate(GOLDEN["reward_order"])}
    chosen = distribution(GOLDEN["pmf"], [ranks[outcome] for outcome in range(len(reference))], row["n"])
    assert chosen.sum().item() == pytest.approx(1, abs=1e-12)
    exact = torch.special.xlogy(chosen, chosen / reference).sum().item()
    assert exact == pytest.approx(row["exact_kl"], abs=1e-9)
    assert kl_bound(row["n"]) == pytest.approx(row["upper_bound"], abs=1e-9)
    estimate = (chosen * kl_estimates(reference.log(), row["n"])).sum().item()
    assert estimate == pytest.approx(row["estimator_expected"], abs=1e-9)
    assert exact - 1e-9 <= estimate <= kl_bound(row["n"]) + 1e-9


def test_two_outcomes_of_which_the_better_is_always_found() -> None:
    """The KL ends at log 2; the bound goes on to 3.86."""
    chosen = distribution([0.5, 0.5], [0.0, 1.0], 128)
    assert chosen.tolist() == [pytest.approx(0.5**128, abs=1e-40), pytest.approx(1, abs=1e-12)]
    assert kl_estimates(torch.tensor([0.5], dtype=torch.float64).log(), 128).item() == pytest.approx(math.log(2), abs=1e-9)
    assert kl_bound(128) == pytest.approx(3.8598, abs=1e-4)


@pytest.mark.parametrize("n", [1, 2, 64])
def test_extremes(n: int) -> None:
    """A completion as long as they are gives the bound, without a NaN; a certain one gives 0; one between, by hand."""
    far, beyond, certain = kl_estimates(torch.tensor([-60.0, -5000.0, 0.0]), n).tolist()
    assert [far, beyond] == pytest.approx([kl_bound(n)] * 2, abs=1e-12) and certain == 0
    e = 0.25
    some = 1 - (1 - e) ** n
    by_hand = (1 - some) * (math.log(n) + (n - 1) * math.log(1 - e) - (n - 1) / n) + some * math.log(some / e)
    assert kl_estimates(torch.tensor([e], dtype=torch.float64).log(), n).item() == pytest.approx(by_hand, abs=1e-12)


def test_win_rate_bound() -> None:
    """Of best-of-4 against one sample of a million different outcomes."""
    chosen = distribution([1e-4] * 10_000, list(range(10_000)), 4)
    below = torch.arange(10_000) * 1e-4
    assert (chosen * (below + 0.5e-4)).sum().item() == pytest.approx(win_rate_bound(4), abs=1e-6)
