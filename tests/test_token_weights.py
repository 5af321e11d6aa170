"""Weights of tokens against the authors' codes, and that they do not depend on how a round is split over processes."""

from __future__ import annotations

import math

import pytest
import torch
from grids import Grid, read, same, tensor, together

from posttrain.importance import surrogate
from posttrain.token_weights import (
    clip_cov,
    covariance,
    entropy_change,
    entropy_weight,
    kept_entropy,
    kl_cov,
    largest,
    steer,
    top,
)


def alone(values: torch.Tensor) -> torch.Tensor:
    return values


def test_steer_golden() -> None:
    golden = read("steer_token_weights")
    given, grid = golden["inputs"], Grid(golden["inputs"]["mask"])
    sides = [grid.flat(given[name]) for name in ("advantages", "new_logprobs", "old_logprobs", "entropy")]
    change = entropy_change(*sides)
    same(change.abs(), grid.flat(golden["outputs"]["abs_omega_float64"]).tolist())
    same(steer(change, 0.8, alone), grid.flat(golden["outputs"]["exp_float64"]).tolist())
    same(steer(change, 0.8, alone), grid.flat(golden["outputs"]["exp"]).tolist(), 1e-5)
    same(steer(change, 0.8, alone, most=1.2), grid.flat(golden["outputs"]["linear"]).tolist(), 1e-5)


def test_steer_of_another_reading() -> None:
    golden = read("t2_rlvr")["steer"]
    logps = tensor(golden["logp"])
    change = entropy_change(tensor(golden["adv"]), logps, logps, tensor(golden["entropy"]))
    same(change.abs(), golden["abs_omega"])
    same(steer(change, golden["wmin"], alone, most=golden["wmax"]), golden["weights"], 1e-8)
    assert steer(torch.zeros(3), 0.8, alone).tolist() == [1.0] * 3


KL_COV, CLIP_COV = read("kl_cov_loss"), read("clip_cov_loss")


def _sides(golden: dict) -> tuple[Grid, torch.Tensor, list[torch.Tensor]]:
    given, grid = golden["inputs"], Grid(golden["inputs"]["mask"])
    leaf = tensor(given["new_logprobs"]).requires_grad_()
    return grid, leaf, [grid.flat(leaf), grid.flat(given["old_logprobs"]), grid.flat(given["advantages"])]


@pytest.mark.parametrize(("name", "share"), [("prime_k_percent_10.0", 0.1), ("prime_k_percent_15.0", 0.15)])
def test_kl_cov_golden(name: str, share: float) -> None:
    grid, leaf, (logps, old, advantages) = _sides(KL_COV)
    cov = covariance(advantages, logps, alone)
    same(cov, grid.flat(KL_COV["outputs"]["token_covariance"]).tolist())
    held = kl_cov(cov, share, alone)
    losses = -advantages * (logps - old).exp() + KL_COV["inputs"]["ppo_kl_coef"] * held * (logps - old).abs()
    same(losses.mean(), KL_COV["outputs"][name]["loss"])
    same(torch.autograd.grad(losses.mean(), leaf)[0], KL_COV["outputs"][name]["grad"])
    same((logps - old).abs().mean(), KL_COV["outputs"][name]["abs_kl"])


@pytest.mark.parametrize("low", [0.2, 1.0])
def test_clip_cov_golden(low: float) -> None:
    """All candidates are left out, so that no draw matters; what is clipped already is no candidate."""
    grid, leaf, (logps, old, advantages) = _sides(CLIP_COV)
    expected, epsilon = CLIP_COV["outputs"][f"lb{low}_ub5.0"], CLIP_COV["inputs"]["cliprange"]
    cov = covariance(advantages, logps, alone)
    same(cov, grid.flat(CLIP_COV["outputs"]["token_covariance"]).tolist())
    ratio = (logps - old).exp()
    losses, clipped = surrogate(ratio, advantages, epsilon, epsilon, None)
    already = (clipped["clip/low"] + clipped["clip/high"]) > 0
    out = clip_cov(cov, 1.0, low, 5.0, alone, already)
    loss = torch.where(out, 0, losses).mean()
    same(loss, expected["loss"], 1e-8)  # verl adds 1e-8 to the count
    same(torch.autograd.grad(loss, leaf)[0], expected["grad"], 1e-8)
    assert out.double().mean().item() == pytest.approx(expected["clipfrac"], abs=1e-8)


def test_cov_of_another_reading() -> None:
    golden = read("t2_rlvr")
    cov = covariance(tensor(golden["steer"]["adv"]), tensor(golden["steer"]["logp"]), alone)
    same(cov, golden["cov"]["values"])


def test_clip_cov_draws_its_share_within_the_bounds() -> None:
    cov = 3 * torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = clip_cov(cov, 0.1, 1.0, 2.0, alone)
    assert out.sum() == 400 and (cov[out] > 1).all() and (cov[out] < 2).all()
    assert abs(cov[out].mean() - 1.5) < 0.05  # drawn, not the largest
    assert clip_cov(cov, 0.9, 1.0, 2.0, alone).sum() == ((cov > 1) & (cov < 2)).sum()


def test_the_largest_whatever_their_sign() -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert top(values, 7, alone).nonzero().flatten().tolist() == sorted(values.topk(7).indices.tolist())
    assert largest(values, alone) == values.max().item() and largest(-values.abs(), alone) == -values.abs().min().item()
    assert largest(torch.empty(0), alone) == 0.0
    assert top(torch.tensor([1.0, 2.0]), 5, alone).all()
    assert top(torch.tensor([1.0, 2.0, 2.0]), 1, alone).tolist() == [False, True, True]


def test_processes_agree_with_one() -> None:
    generator = torch.Generator().manual_seed(1)
    advantages, logps, entropy = torch.randn(3, 40, generator=generator, dtype=torch.float64).abs()
    logps = -logps
    parts = [slice(0, 11), slice(11, 11), slice(11, 40)]

    def everything(rows: slice, total) -> list[torch.Tensor]:
        cov = covariance(advantages[rows], logps[rows], total)
        change = entropy_change(advantages[rows], logps[rows], logps[rows], entropy[rows])
        return [cov, kl_cov(cov, 0.1, total), clip_cov(cov, 0.1, -1, 1, total), steer(change, 0.8, total)]

    split = together(3, lambda rank, total: everything(parts[rank], total))
    for whole, *three in zip(everything(slice(None), alone), *split, strict=True):
        torch.testing.assert_close(torch.cat(three), whole, rtol=0, atol=1e-12)
    assert kl_cov(covariance(advantages, logps, alone), 0.1, alone).sum() == 4


AENT = read("aent_clamped_entropy")


@pytest.mark.parametrize("share", [0.0, 0.2, 0.3, 0.75])
def test_kept_entropy_golden(share: float) -> None:
    logits = tensor(AENT["inputs"]["logits"]).requires_grad_()
    same(kept_entropy(logits.log_softmax(-1), share), AENT["outputs"]["clamped_entropy"][f"clamp_p_{share}"])
    assert torch.autograd.gradcheck(lambda x: kept_entropy(x.log_softmax(-1), share), logits)


def test_entropy_weight_golden() -> None:
    bounds, box = {"low": 0.05, "high": 0.23}, (1e-5, 3e-3)
    inside = AENT["inputs"], AENT["outputs"]["coefficient_after_each"], 1e-3
    hitting = AENT["outputs"]["box_hitting"]
    for given, expected, rate in (inside, (hitting, hitting["coefficient_after_each"], hitting["lr"])):
        weight = given["init"]
        for entropy, after in zip(given["entropy_trace"], expected, strict=True):
            weight = entropy_weight(weight, entropy, **bounds, rate=rate, box=box)
            assert math.isclose(weight, after, abs_tol=1e-12)
