"""Advantages: values of the authors' codes, values by hand, and what each promises."""

from __future__ import annotations

import pytest
import torch
from grids import read, same, tensor, together

from posttrain.advantages import aapo, dr_grpo, gae, grpo, opo, qae, returns_to_go, rloo, whitened

SCORES = tensor([3.0, 1.0, 2.0, 2.0])
"""Two prompts, two completions each."""


def test_rloo_is_the_score_minus_the_mean_of_the_others() -> None:
    same(rloo(SCORES, 2), [2.0, -2.0, 0.0, 0.0], 0)
    scores = torch.randn(12, dtype=torch.float64)
    others = [scores[4 * (i // 4) : 4 * (i // 4) + 4].sum() - scores[i] for i in range(12)]
    same(rloo(scores, 4), [(scores[i] - others[i] / 3).item() for i in range(12)], 1e-12)


def test_group_means_and_deviations_by_hand() -> None:
    same(dr_grpo(SCORES, 4), [1.0, -1.0, 0.0, 0.0], 0)
    deviation = (2 / 3) ** 0.5  # unbiased
    same(grpo(SCORES, 4, eps=0.0), [1 / deviation, -1 / deviation, 0.0, 0.0], 1e-12)
    same(grpo(tensor([0.7, 0.7]), 2), [0.0, 0.0], 0)
    same(opo(SCORES, 2, torch.tensor([3, 1, 5, 7])), [0.5, -1.5, 0.0, 0.0], 1e-12)  # (9 + 1) / 4 = 2.5


QAE = read("qae_advantages")


@pytest.mark.parametrize("name", [name for name in QAE["outputs"] if name != "notes"])
def test_qae_golden(name: str) -> None:
    group, _, quantile = name.rpartition("_K")
    scores, expected = tensor(QAE["inputs"]["groups"][group]), QAE["outputs"][name]
    for variant, interpolated in (("paper", False), ("code", True)):
        same(qae(scores, len(scores), float(quantile), interpolated=interpolated), expected[variant]["advantage"])
    same(grpo(scores, len(scores), eps=1e-6), expected["mean_baseline_grpo"])


def test_qae_learns_from_rare_successes_or_rare_failures_alone() -> None:
    """Arithmetic of the share: 0.6 of 5 is 3 whatever its last digit; the other golden file has the quantile only."""
    same((qae(tensor([1.0, 1, 1, 0, 0]), 5, 0.6) == 0).double(), [1, 1, 1, 0, 0], 0)
    same((qae(tensor([1.0, 1, 0, 0, 0]), 5, 0.6) == 0).double(), [0, 0, 1, 1, 1], 0)
    golden = read("t2_rlvr")["qae"]
    scores = tensor(golden["rewards"])
    assert ((qae(scores, 8, golden["K"]) == 0) == (scores == golden["quantile"])).all()


def test_aapo_golden() -> None:
    golden = read("aapo_advantages")
    scores, theirs = (tensor(golden["inputs"][name]) for name in ("rewards", "ref_rewards"))
    same(grpo(scores, 6), golden["outputs"]["group_advantage"])
    same(aapo(scores, theirs, 6), golden["outputs"]["augmented"])
    other = read("t2_rlvr")["aapo"]
    same(aapo(tensor(other["rewards"]), tensor(other["ref_rewards"]), 4), other["advantage"])


def test_gae_by_its_sum() -> None:
    """A_t = sum (gamma lambda)^k d_(t+k), of completions of 3 and 1 tokens."""
    rewards, values = tensor([1.0, -1.0, 2.0, 5.0]), tensor([0.5, 0.25, 1.0, 3.0])
    gamma, lam = 0.9, 0.8
    d = [1 + gamma * 0.25 - 0.5, -1 + gamma * 1.0 - 0.25, 2 - 1.0]
    factor = gamma * lam
    expected = [d[0] + factor * d[1] + factor**2 * d[2], d[1] + factor * d[2], d[2], 2.0]
    advantages, returns = gae(rewards, values, torch.tensor([3, 1]), gamma, lam)
    same(advantages, expected, 1e-12)
    same(returns, (tensor(expected) + values).tolist(), 1e-12)


def test_gae_at_lambda_1_is_the_return_above_the_value() -> None:
    rewards, values, lengths = torch.randn(9).double(), torch.randn(9).double(), torch.tensor([2, 3, 4])
    advantages, returns = gae(rewards, values, lengths)
    same(returns, returns_to_go(rewards, lengths).tolist(), 1e-12)
    same(advantages, (returns - values).tolist(), 1e-12)
    same(returns_to_go(tensor([1.0, 2.0, 4.0]), torch.tensor([3]), 0.5), [3.0, 4.0, 4.0], 1e-12)


def test_nothing_comes_of_nothing() -> None:
    """A process without completions."""
    none, lengths = torch.empty(0), torch.empty(0, dtype=torch.int64)
    for got in (rloo(none, 2), grpo(none, 2), opo(none, 2, lengths), qae(none, 2), *gae(none, none, lengths)):
        assert got.shape == (0,) and got.dtype == torch.float32
    assert whitened(none, none.bool(), lambda x: x).shape == (0,)


def test_whitening_is_over_all_processes() -> None:
    values, mask = torch.randn(10, dtype=torch.float64), torch.tensor([1, 1, 0, 1, 1, 1, 0, 1, 1, 1]).bool()
    kept = values[mask]
    expected = (values - kept.mean()) / (kept.var() + 1e-8).sqrt()
    same(whitened(values, mask, lambda x: x), expected.tolist(), 1e-12)
    parts = [(values[:4], mask[:4]), (values[4:], mask[4:])]
    same(torch.cat(together(2, lambda rank, total: whitened(*parts[rank], total))), expected.tolist(), 1e-12)
