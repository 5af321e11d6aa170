"""The fused kernel equals the dense definition; run by test_kernels_fused.py in Triton's interpreter, and as it is on a GPU:

python -m pytest tests/fused_cases.py
"""

from __future__ import annotations

import pytest
import torch
from heads import DIVERGENCES, OPTIONS, TINY, assert_equal_to_dense, cast, ids, normal, policy, reference
from posttrain_kernels import ONE_HEAD, Head, Rowwise, Separable, fused, head_stats
from posttrain_kernels.formulas import FORMULAS
from torch import Tensor

from posttrain.divergences import DIVERGENCES as NAMED
from posttrain.divergences import divergence
from posttrain.vocabulary import _entry

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, V = 4, 140
BY_NAME = [*ONE_HEAD, "ref_logp", "ref_lse", "forward_kl", "reverse_kl"]


def check(head: Head, want: list, *, ref: Head | None = None, workspace: int = TINY, **arguments) -> None:
    ref = reference(N, V) if ref is None else ref
    assert_equal_to_dense(head, want, torch.float32, ref=ref, workspace=workspace, impl="fused", device=DEVICE, **arguments)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(name: str) -> None:
    options = dict(OPTIONS[name])
    if isinstance(options.get("temperature"), Tensor) and options["temperature"].dim():
        options["temperature"] = options["temperature"][:N]
    if "vocab" in options:
        options["vocab"] -= 555  # of 140: 95 and 135
    check(policy(n=N, v=V, **options), BY_NAME)


@pytest.mark.parametrize("name", ["logp", "lse", "entropy", "log_sum_p2", "max_logp", "gather", "reverse_kl"])
def test_each_statistic_alone(name: str) -> None:
    """Alone, its upstream gradient moves into the row factor; frozen, the schedule is row-scale; eager, all in the forward."""
    head = policy(n=N, v=V, softcap=4.0)
    check(head, [name])
    check(head, [name], weight=False)
    if name != "gather":
        check(head, [name], eager=name)


@pytest.mark.parametrize(
    "name", [*(name for name in FORMULAS if name in NAMED), *(f"{n}:0.3" for n in FORMULAS if n not in NAMED)]
)
def test_formulas_are_the_divergences_of_their_names(name: str) -> None:
    entry = _entry(name)
    entry = Separable(name, divergence(name).summand, divergence(name).slope, (name, 0.0)) if isinstance(entry, str) else entry
    assert fused.passes_for([entry]) is fused.WHOLE
    check(policy(n=N, v=V), [entry, "logp"], ref=reference(N, 120))


def test_statistics_that_torch_evaluates() -> None:
    """Without a formula, of whole rows, and mixed with others; the options are taken into account before."""
    largest = Rowwise("largest", lambda lp, lq, target: (lp * lq.exp()).amax(-1))
    head = policy(n=N, v=V, bias=True, softcap=4.0, temperature=0.7)
    check(head, ["logp", *DIVERGENCES])
    check(head, [largest, "entropy", "reverse_kl"])
    assert fused.passes_for(["logp", DIVERGENCES[2]]) is fused.passes_for([largest]) is fused.FOLD


@pytest.mark.parametrize("workspace", [TINY, 1_000_000])
def test_how_the_loops_are_cut_does_not_matter(workspace: int) -> None:
    check(policy(n=33, v=66, extra=True), ["logp"], ref=reference(33, 62), workspace=workspace, keep=10**6)
    want = ["logp", "entropy", Separable("jsd", divergence("jsd:0.3").summand, formula=("jsd", 0.3))]
    check(policy(n=33, v=66, extra=True), want, ref=reference(33, 62), workspace=workspace)


def test_a_token_has_the_same_bits_in_any_batch_and_schedule() -> None:
    n = 33
    head, ref = cast(policy(n=n, v=V), torch.float32, x=False, weight=False, device=DEVICE)[0], None
    target = ids(n, V).to(DEVICE)
    whole = head_stats(head, ["logp"], target=target, impl="fused")["logp"]
    for rows in (slice(0, 1), slice(7, 32)):
        part = Head(head.x[rows], head.weight)
        assert torch.equal(head_stats(part, ["logp"], target=target[rows], impl="fused")["logp"], whole[rows])
    ref = Head(head.x, head.weight)
    frozen = Head(head.x.clone().requires_grad_(), head.weight)
    both = head_stats(frozen, ["logp", "ref_logp", "reverse_kl"], target=target, ref=ref, impl="fused")
    assert torch.equal(both["logp"], whole) and torch.equal(both["ref_logp"], whole)
    assert both["reverse_kl"].abs().max() == 0


def test_confident_tokens_keep_their_gradient() -> None:
    """1 - p of the target down to 1e-10, where p itself rounds to 1 in float32."""
    weight, target = normal(256, 32, seed=11), ids(12, 256)
    x = 0.2 * normal(12, 32, seed=12) + torch.linspace(0.5, 0.8, 12, dtype=torch.float64)[:, None] * weight[target]
    results = []
    for dtype, impl, device in ((torch.float64, "dense", "cpu"), (torch.float32, "fused", DEVICE)):
        hidden = x.to(device, dtype).requires_grad_()
        head = Head(hidden, weight.to(device, dtype))
        logp = head_stats(head, ["logp"], target=target.to(device), impl=impl)["logp"]
        results.append((logp.detach().cpu().double(), torch.autograd.grad(logp.sum(), hidden)[0].cpu().double()))
    (truth, slope), (value, gradient) = results
    rows = truth.abs() > 1e-10
    assert rows.sum() > 6 and (truth[rows].abs() < 1e-6).sum() >= 2
    assert ((value - truth) / truth)[rows].abs().max() < 5e-5
    assert ((gradient - slope).norm(dim=1) / slope.norm(dim=1))[rows].max() < 5e-5


def test_a_gradient_for_narrow_products_is_rounded_once() -> None:
    """Within one unit in the last place of bfloat16: the interpreter cuts where a GPU rounds."""
    z, lse = (3 * normal(4, 100, seed=1)).float().to(DEVICE), torch.full((4,), 6.0, device=DEVICE)
    outs = [torch.empty(4, 100, dtype=dtype, device=DEVICE) for dtype in (torch.float32, torch.bfloat16)]
    at_max, argmax = torch.full_like(lse, -0.5), z.argmax(-1)
    nothing = fused._raw(None, 0, 100, slice(0, 4)) | fused._launch(100) | {"NAMES": (), "PARAMETERS": ()}
    for out in outs:
        fused._gradient[(4,)](
            z, 100, out, 100, 100, 0, lse, None, None, None, at_max, argmax, argmax, None, 1,
            None, 0, None, None, None, 4, **nothing,
        )  # fmt: skip
    want = (z - 6).exp().scatter(1, argmax[:, None], -0.5)
    torch.testing.assert_close(outs[0], want, rtol=1e-5, atol=0)
    torch.testing.assert_close(outs[1].float(), want, rtol=2**-7, atol=0)


@pytest.mark.skipif(DEVICE == "cpu", reason="narrow products with wide sums are a GPU's")
@pytest.mark.parametrize("impl", ["fused", "chunked"])
@pytest.mark.parametrize("frozen", [False, True])
def test_bfloat16_inputs_have_float32_logits(impl: str, frozen: bool) -> None:
    """Log-probs to 1e-6 of the largest logit, gradients to 2^-8 (twice the rounding of a bfloat16 result)."""
    n, v = 1500, 20_000
    x, weight, target, upstream = (
        normal(n, 64, seed=1).bfloat16(),
        normal(v, 64, seed=2).bfloat16(),
        ids(n, v),
        normal(n, seed=3),
    )
    found = []
    for dtype, how, device in ((torch.float64, "dense", "cpu"), (torch.bfloat16, impl, DEVICE)):
        leaves = [x.to(device, dtype).requires_grad_(), weight.to(device, dtype).requires_grad_(not frozen)]
        logp = head_stats(Head(*leaves), ["logp"], target=target.to(device), impl=how)["logp"]
        leaves = leaves[:1] if frozen else leaves
        gradients = torch.autograd.grad((logp.double() * upstream.to(device)).sum(), leaves)
        found.append([logp.detach().cpu().double(), *(gradient.cpu().double() for gradient in gradients)])
    (truth, *slopes), (values, *gradients) = found
    assert (values - truth).abs().max() <= 1e-6 * (x.double() @ weight.double().T).abs().max()
    for gradient, slope in zip(gradients, slopes, strict=True):
        assert (gradient - slope).norm() <= 2**-8 * slope.norm()


def test_what_is_not_finite_comes_out() -> None:
    head, _ = cast(policy(n=N, v=V), torch.float32, x=False, weight=False, device=DEVICE)
    head.x[2, 0] = torch.nan
    logp = head_stats(head, ["logp"], target=ids(N, V).to(DEVICE), impl="fused")["logp"]
    assert logp.isnan().tolist() == [False, False, True, False]
