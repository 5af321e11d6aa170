"""The kernel against full-vocabulary statistics computed by independent float64 code, and the authors' losses through it.

Hidden states = logits and weight = identity, so the kernel's logits are the file's to the last bit.
"""

from __future__ import annotations

import pytest
import torch
from golden import Golden, close, golden, tensor
from posttrain_kernels import Head, Separable, head_stats

from posttrain.divergences import divergence
from posttrain.objectives.preference.dpo import DPOConfig
from posttrain.registry import find
from posttrain.stats import Completions, Pairs

every_impl = pytest.mark.parametrize("impl", ["dense", "chunked"])
workspaces = pytest.mark.parametrize("workspace", [None, 2048])


def heads(file: Golden) -> tuple[Head, Head, torch.Tensor]:
    """Policy head, reference head and targets of all positions that predict a token, [2B * (S - 1)] of them."""
    size = file.policy_logits.shape[-1]
    eye = torch.eye(size, dtype=torch.float64)
    policy = Head(file.policy_logits[:, :-1].reshape(-1, size), eye)
    reference = Head(tensor(file.inputs["ref_logits"])[:, :-1].reshape(-1, size), eye)
    return policy, reference, file.targets.flatten()


@every_impl
@workspaces
def test_full_vocabulary_statistics(impl: str, workspace: int | None) -> None:
    file = golden("stats_full_vocab")
    policy, reference, targets = heads(file)
    generic = [Separable(f"generic/{name}", divergence(name).summand) for name in ("reverse_kl", "forward_kl")]
    want = ["logp", "ref_logp", "entropy", "reverse_kl", "forward_kl", "log_sum_p2", "max_logp", *generic]
    got = head_stats(policy, want, target=targets, ref=reference, workspace=workspace, impl=impl)
    mask = tensor(file.outputs["mask"]).flatten()
    assert torch.equal(mask, file.mask.flatten().double())
    expected = {name: tensor(values).flatten() for name, values in file.outputs.items()}
    close(got["logp"] * mask, expected["tok"].tolist())
    close(got["ref_logp"] * mask, expected["rtok"].tolist())
    for ours, name in (
        ("entropy", "entropy"),
        ("reverse_kl", "kl_pi_ref"),
        ("forward_kl", "kl_ref_pi"),
        ("generic/reverse_kl", "kl_pi_ref"),
        ("generic/forward_kl", "kl_ref_pi"),
        ("log_sum_p2", "log_sum_p2"),
        ("max_logp", "log_max_p"),
    ):
        close(got[ours], expected[name].tolist())
    close(got["log_sum_p2"].exp(), expected["sum_p2"].tolist())
    close(got["max_logp"].exp(), expected["max_p"].tolist())


@every_impl
@workspaces
@pytest.mark.parametrize(
    ("name", "divergence"),
    [("fdpo_reverse_kl", "reverse_kl"), ("fdpo_forward_kl", "forward_kl"), ("fdpo_alpha0.3", "alpha:0.3")],
)
def test_authors_losses_through_the_kernel(name: str, divergence: str, impl: str, workspace: int | None) -> None:
    file = golden(name)
    policy, reference, targets = heads(file)
    got = head_stats(policy, ["logp", "ref_logp"], target=targets, ref=reference, workspace=workspace, impl=impl)
    half = len(file.mask) // 2

    def role(rows: slice) -> Completions:
        logps, reference_logps = (got[key].view(file.mask.shape)[rows] for key in ("logp", "ref_logp"))
        mask = file.mask[rows]
        return Completions(logps=logps[mask], lengths=mask.sum(1), reference_logps=reference_logps[mask])

    pairs = Pairs(chosen=role(slice(0, half)), rejected=role(slice(half, None)))
    losses = find("dpo")(DPOConfig(beta=file.inputs["beta"], divergence=divergence), pairs).values
    close(losses, file.outputs["per_example_losses"])
    (gradient,) = torch.autograd.grad(losses.mean(), file.policy_logits)
    close(gradient, file.outputs["grad_policy_logits"])
