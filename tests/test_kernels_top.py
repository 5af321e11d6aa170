"""The likeliest items of every token."""

from __future__ import annotations

import pytest
import torch
from heads import OPTIONS, TINY, N, V, cast, peak_bytes, policy
from posttrain_kernels import head_stats, top_k
from posttrain_kernels.dense import logits


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_as_a_sort_of_all_logits(options: dict, dtype: torch.dtype) -> None:
    head, _ = cast(policy(**options), dtype)
    for k in (1, 7, 100):  # 100: more than a tile holds
        found, logps = top_k(head, k, workspace=TINY)
        lp = logits(head, head.size).log_softmax(-1)
        tolerance = 1e-10 if dtype == torch.float64 else 1e-5
        assert found.shape == logps.shape == (N, k) and found.dtype == torch.int64 and logps.dtype == lp.dtype
        assert not logps.requires_grad
        torch.testing.assert_close(logps, lp.sort(-1, descending=True).values[:, :k], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(logps, lp.gather(1, found), rtol=tolerance, atol=tolerance)
        assert (logps.diff(dim=1) <= 0).all() and all(len(row.unique()) == k for row in found)


def test_the_whole_vocabulary() -> None:
    found, logps = top_k(policy(), V)
    assert torch.equal(found.sort(1).values, torch.arange(V).expand(N, V))
    torch.testing.assert_close(logps.exp().sum(1), torch.ones(N, dtype=torch.float64))


@pytest.mark.parametrize("workspace", [TINY, None])
def test_the_bits_of_gather(workspace: int | None) -> None:
    head, _ = cast(policy(n=300, v=5000), torch.float32)
    found, logps = top_k(head, 5, workspace=workspace)
    assert torch.equal(logps, head_stats(head, ["gather"], index=found, workspace=workspace)["gather"].detach())
    best = head_stats(head, ["argmax", "max_logp"], workspace=workspace)
    assert torch.equal(found[:, 0], best["argmax"]) and torch.equal(logps[:, 0], best["max_logp"].detach())


def test_no_tokens() -> None:
    found, logps = top_k(policy(n=0), 5)
    assert found.shape == logps.shape == (0, 5) and found.dtype == torch.int64


def test_memory() -> None:
    n, v, workspace = 2048, 10_000, 4 << 20
    head, _ = cast(policy(n=n, v=v), torch.float32, x=False, weight=False)
    assert peak_bytes(lambda: top_k(head, 10, workspace=workspace)) < 1.25 * workspace + 12 * n * 10 * 3 + 4 * n * 30


@pytest.mark.parametrize("k", [0, V + 1])
def test_mistakes(k: int) -> None:
    with pytest.raises(ValueError, match=f"k: {k} is not within 1 and the {V} items"):
        top_k(policy(), k)
