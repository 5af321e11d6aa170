"""Ratios, clips and corrections: losses and gradients of TRL's own GRPO, and values by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grids import Grid, read, same, tensor

from posttrain.importance import BOUNDS, correction, mismatch, ratio, surrogate
from posttrain.kl import in_loss
from posttrain.stats import Completions

GOLDEN = read("grpo_trl_losses")
GRID = Grid(GOLDEN["inputs"]["completion_mask"])


def _trl(
    level: str = "token", high: float = 0.2, dual: float | None = None, *, on_policy: bool = False
) -> tuple[torch.Tensor, Completions, torch.Tensor, torch.Tensor]:
    """Leaf [B, T], completions, [N] ratio and [N] losses of the golden's inputs."""
    given = GOLDEN["inputs"]
    leaf = tensor(given["new_logps"]).requires_grad_()
    one = GRID.completions(leaf, tensor(given["ref_logps"]))
    old = one.logps.detach() if on_policy else GRID.flat(given["old_logps"])
    r = ratio(one, old, level)
    losses, _ = surrogate(r, one.spread(tensor(given["advantages"])), 0.2, high, dual)
    return leaf, one, r, losses


def _agree(name: str, leaf: torch.Tensor, loss: torch.Tensor) -> None:
    expected = GOLDEN["outputs"][name]
    same(loss, expected["loss"])
    same(torch.autograd.grad(loss, leaf)[0], expected["grad"])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("grpo", {}),
        ("bnpo", {}),
        ("dapo", {}),
        ("dr_grpo", {}),
        ("dapo_clip_higher_0.28", {"high": 0.28}),
        ("dapo_delta_1.5", {"dual": 1.5}),
        ("gspo_grpo_sequence_level", {"level": "sequence_mean"}),
    ],
)
def test_trl_golden(name: str, options: dict[str, Any]) -> None:
    leaf, one, _, losses = _trl(**options)
    of_rows = one.mean(losses).mean()
    constant = one.sum(losses).sum() / (len(one.lengths) * GOLDEN["inputs"]["max_completion_length"])
    means = {"grpo": of_rows, "gspo_grpo_sequence_level": of_rows, "dr_grpo": constant}
    _agree(name, leaf, means.get(name, losses.mean()))


def test_trl_golden_of_rollout_weights() -> None:
    leaf, _, _, losses = _trl()
    _agree("dapo_with_rollout_is", leaf, (losses * GRID.flat(GOLDEN["inputs"]["rollout_importance_ratio"])).mean())


@pytest.mark.parametrize(
    ("name", "estimate"),
    [
        ("k3_plain", "k3"),
        ("k3_bias_corrected", "ratio_k3"),
        ("onpolicy_k3_plain", "k3"),
        ("onpolicy_bias_corrected", "ratio_k3"),
    ],
)
def test_trl_golden_of_kl_in_the_loss(name: str, estimate: str) -> None:
    leaf, one, r, losses = _trl(on_policy=name.startswith("onpolicy"))
    losses = losses + 0.04 * in_loss(estimate, one.logratios, r)
    _agree(f"grpo_beta0.04_{name}", leaf, one.mean(losses).mean())


def test_shares_of_clipped_tokens_are_those_of_trl() -> None:
    given = GOLDEN["inputs"]
    _, one, r, _ = _trl()
    _, clipped = surrogate(r, one.spread(tensor(given["advantages"])), 0.2, 0.2, None)
    expected = GOLDEN["outputs"]["grpo"]["metrics"]
    assert clipped["clip/low"].mean().item() == pytest.approx(expected["clip_ratio/low_mean"], abs=1e-6)
    assert clipped["clip/high"].mean().item() == pytest.approx(expected["clip_ratio/high_mean"], abs=1e-6)


def test_every_branch_of_the_clip_by_hand() -> None:
    """Ratios 2 and 1/2 under advantages of both signs, then 5 under a dual clip of 3."""
    r = tensor([2.0, 2.0, 0.5, 0.5, 5.0]).requires_grad_()
    a = tensor([1.0, -1.0, 1.0, -1.0, -1.0])
    losses, clipped = surrogate(r, a, 0.2, 0.28, 3.0)
    same(losses, [-1.28, 2.0, -0.5, 0.8, 3.0], 1e-12)
    same(torch.autograd.grad(losses.sum(), r)[0], [0.0, 1.0, -1.0, 0.0, 0.0], 0)
    assert {name: share.tolist() for name, share in clipped.items()} == {
        "clip/low": [0, 0, 0, 1, 0],
        "clip/high": [1, 0, 0, 0, 0],
        "clip/dual": [0, 0, 0, 0, 1],
    }
    free, clipped = surrogate(r, a, None, None, None)
    same(free, (-r * a).tolist(), 0)
    assert not torch.stack(list(clipped.values())).any()


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_mean"])
def test_on_policy_the_ratio_is_1_exactly(level: str) -> None:
    logps = -torch.rand(7, dtype=torch.float32, requires_grad=True)
    one = Completions(logps=logps, lengths=torch.tensor([3, 4]))
    r = ratio(one, logps.detach(), level)
    assert (r == 1).all()
    slope = torch.autograd.grad(r.sum(), logps)[0]
    expected = {"token": [1.0] * 7, "sequence": [3.0] * 3 + [4.0] * 4, "sequence_mean": [1.0] * 7}[level]
    same(slope, expected, 1e-6)


ENGINE = tensor([0.0, 0.0, 0.0, 0.0])
"""Engine log-probs of two completions of 2 tokens: trainer / engine is then e^d of the trainer's."""


def _corrected(mode: str, factors: list[float], bounds: tuple[float, float] | None = None) -> torch.Tensor:
    one = Completions(logps=tensor(factors).log(), lengths=torch.tensor([2, 2]))
    return correction(one, ENGINE, mode, bounds or BOUNDS[mode])


def test_corrections_by_hand() -> None:
    factors = [4.0, 0.25, 1.5, 1.6]
    same(_corrected("token_truncate", factors), [2.0, 0.25, 1.5, 1.6], 1e-12)
    same(_corrected("token_truncate", factors, (0.5, 2.0)), [2.0, 0.5, 1.5, 1.6], 1e-12)
    same(_corrected("token_mask", factors), [4.0, 0.0, 1.5, 1.6], 1e-12)
    same(_corrected("sequence_truncate", factors), [1.0, 1.0, 2.0, 2.0], 1e-12)
    same(_corrected("sequence_mask", factors, (0.0, 2.0)), [1.0, 1.0, 0.0, 0.0], 1e-12)
    same(_corrected("sequence_mean_mask", factors, (0.0, 2.0)), [1.0, 1.0, 2.4**0.5, 2.4**0.5], 1e-12)
    same(_corrected("geometric_filter", factors), [1.0, 1.0, 0.0, 0.0], 0)


def test_a_correction_of_nothing_is_1() -> None:
    for mode in BOUNDS:
        same(_corrected(mode, [1.0] * 4), [1.0] * 4, 0)


def test_the_gap_is_seen_before_it_is_cut() -> None:
    one = Completions(logps=tensor([4.0, 0.25, 1.0, 1.0]).log(), lengths=torch.tensor([2, 2]))
    seen = mismatch(one, ENGINE)
    same(seen["mismatch/gap"].exp(), [4.0, 4.0, 1.0, 1.0], 1e-12)
    same(seen["mismatch/weight/max"].max(), 4.0, 1e-12)
    same(seen["mismatch/weight_of_completion"], [1.0, 1.0], 1e-12)
    d = tensor([4.0, 0.25, 1.0, 1.0]).log()
    same(seen["mismatch/k3"], (d.exp() - 1 - d).tolist(), 1e-12)
    extreme = mismatch(Completions(logps=torch.tensor([-900.0, -1.0]), lengths=torch.tensor([2])), torch.tensor([-1.0, -900.0]))
    assert all(value.isfinite().all() for value in extreme.values())


def test_extreme_ratios_have_a_gradient() -> None:
    """Log-ratios of +-1000 in float32: no NaN, and no silence where the clip lets a gradient through."""
    logps = torch.tensor([-1.0, -1001.0], requires_grad=True)
    one = Completions(logps=logps, lengths=torch.tensor([2]))
    for sign in (1.0, -1.0):
        losses, _ = surrogate(ratio(one, torch.tensor([-1001.0, -1.0]), "token"), torch.full((2,), sign), 0.2, 0.2, None)
        (slope,) = torch.autograd.grad(losses.sum(), logps)
        assert losses.isfinite().all() and slope.isfinite().all()
    assert slope[0] > 0  # negative advantage: pushed down although the ratio is beyond every bound
