"""The chunked kernel equals the dense definition, in value and gradient, whatever the options and however the loops are cut."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from heads import (
    DIVERGENCES,
    EVERYTHING,
    OPTIONS,
    TINY,
    N,
    V,
    assert_equal_to_dense,
    cast,
    ids,
    normal,
    peak_bytes,
    policy,
    reference,
    stats_and_gradients,
    values_and_gradients,
)
from posttrain_kernels import KLS, ONE_HEAD, Head, Separable, backward, head_stats
from torch import Tensor

from posttrain.divergences import divergence


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option(options: dict, dtype: torch.dtype) -> None:
    for workspace in (TINY, 1_000_000):
        assert_equal_to_dense(policy(**options), EVERYTHING, dtype, workspace=workspace, ref=reference())


@pytest.mark.parametrize("options", ["plain", "all"])
@pytest.mark.parametrize("entry", EVERYTHING, ids=lambda e: e if isinstance(e, str) else e.name)
def test_each_statistic_alone_trained_and_frozen(entry: str | Separable, options: str) -> None:
    """Alone, a statistic's upstream gradient moves into the row factor, and a frozen head takes the row-scale schedule."""
    if entry in ("argmax", "ref_logp", "ref_lse"):
        return
    head = policy(**OPTIONS[options])
    assert_equal_to_dense(head, [entry], torch.float64, ref=reference())
    assert_equal_to_dense(head, [entry], torch.float64, ref=reference(), weight=False)
    assert_equal_to_dense(head, [entry], torch.float64, ref=reference(), x=False)


@pytest.mark.parametrize("want", [["logp", "entropy", "reverse_kl"], ["gather"], ["lse", "js"]], ids=lambda w: "+".join(w))
def test_frozen_head_with_several_statistics(want: list[str]) -> None:
    """One by the row-scale schedule, the others deferred."""
    entries = [Separable("js", divergence("js").summand) if name == "js" else name for name in want]
    assert_equal_to_dense(policy(extra=True), entries, torch.float64, ref=reference(), weight=False)


@pytest.mark.parametrize(("v", "w"), [(V, 500), (500, V), (V, 640)])
def test_vocabularies_are_cut_to_the_common_part_for_divergences_only(v: int, w: int) -> None:
    head, ref = policy(v=v), reference(v=w)
    assert_equal_to_dense(head, EVERYTHING, torch.float64, ref=ref)
    assert_equal_to_dense(head, ["reverse_kl"], torch.float64, ref=ref, weight=False)
    target = ids(high=500)
    got = head_stats(head, ["logp", "ref_logp", "reverse_kl"], target=target, ref=ref)
    logits, ref_logits = head.x @ head.weight.T, ref.x @ ref.weight.T
    lp, lq = logits[:, : min(v, w)].log_softmax(-1), ref_logits[:, : min(v, w)].log_softmax(-1)
    torch.testing.assert_close(got["reverse_kl"], (lp.exp() * (lp - lq)).sum(-1))
    torch.testing.assert_close(got["logp"], logits.log_softmax(-1).gather(1, target[:, None]).squeeze(1))
    torch.testing.assert_close(got["ref_logp"], ref_logits.log_softmax(-1).gather(1, target[:, None]).squeeze(1))


def test_names_agree_with_divergences() -> None:
    """forward_kl and reverse_kl are those of the divergence table, and their written slopes are derivatives."""
    for name, entry in KLS.items():
        by_autograd = Separable("other", divergence(name).summand)
        head, leaves = cast(policy(), torch.float64)
        got = head_stats(head, [name, by_autograd], ref=reference(), workspace=TINY)
        torch.testing.assert_close(got[name], got["other"])
        first, second = (torch.autograd.grad(got[k].sum(), leaves, retain_graph=True) for k in (name, "other"))
        torch.testing.assert_close(first, second)
        assert entry.name == name


def test_a_term_that_ignores_the_reference_or_is_linear() -> None:
    ours = [Separable("mean", lambda lp, lq: lp / V), Separable("entropy_again", lambda lp, lq: -lp.exp() * lp)]
    assert_equal_to_dense(policy(), ours, torch.float64, ref=reference())


@pytest.mark.parametrize("frozen", [False, True])
def test_gradcheck(frozen: bool) -> None:
    head = policy(n=3, v=70, h=4, extra=True, softcap=5.0, temperature=torch.tensor([0.5, 1.0, 2.0]).double())
    target, index = ids(3, 70), ids(3, 70, k=3)
    want = [*(name for name in ONE_HEAD if name != "argmax"), *DIVERGENCES]

    def statistics(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        made = dataclasses.replace(head, x=x, weight=weight, extra=((a, b),))
        return tuple(head_stats(made, want, target=target, index=index, ref=reference(3, 70), workspace=TINY).values())

    (x, weight), (a, b) = head.terms
    inputs = [x.requires_grad_(), weight.requires_grad_(not frozen), a.requires_grad_(), b.requires_grad_(not frozen)]
    assert torch.autograd.gradcheck(statistics, inputs)


@pytest.mark.parametrize("workspace", [TINY, 100_000, 1_000_000])
def test_how_the_loops_are_cut_does_not_matter(workspace: int) -> None:
    head, leaves = cast(policy(n=100, v=3000), torch.float64)
    arguments = {"target": ids(100), "index": ids(100, k=3), "ref": reference(100, 2500)}
    want, want_gradients = values_and_gradients(head, leaves, EVERYTHING, **arguments)
    got, gradients = values_and_gradients(head, leaves, EVERYTHING, workspace=workspace, **arguments)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients, want_gradients, rtol=1e-11, atol=1e-11)


# ------------------------------------------------------------------------------------------------ precision


def bf16_head(n: int, *, confident: bool) -> tuple[Head, Tensor]:
    """A bfloat16 head and targets; `confident`: the target holds all but some 1e-9 to 1e-1 of the probability."""
    weight = normal(4096, 64, seed=11).bfloat16()
    target = ids(n)
    x = normal(n, 64, seed=12) * 0.5
    if confident:
        rows = weight[target].double()
        x += torch.linspace(0.42, 0.58, n, dtype=torch.float64)[:, None] * rows
    return Head(x.bfloat16(), weight), target


def logp_and_gradients(head: Head, target: Tensor, weights: Tensor, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = head.x.detach().clone().requires_grad_(), head.weight.detach().clone().requires_grad_()
    if impl == "bf16 logits":
        logps = (x @ weight.T).log_softmax(-1).gather(1, target[:, None]).squeeze(1)
    else:
        logps = head_stats(Head(x, weight), ["logp"], target=target, impl=impl)["logp"]
    return logps.detach().double(), *(g.double() for g in torch.autograd.grad((logps * weights).sum(), [x, weight]))


@pytest.mark.parametrize("confident", [False, True])
def test_bfloat16_inputs_have_float32_logits(confident: bool) -> None:
    """Stated bound: log-probs to 1e-6 of the largest logit, gradients to 2^-8 (twice the rounding of a bfloat16 result)."""
    head, target = bf16_head(64, confident=confident)
    weights = normal(64, seed=13)
    wide = Head(head.x.double(), head.weight.double())
    truth, dx, dweight = logp_and_gradients(wide, target, weights, "dense")
    ours, our_dx, our_dweight = logp_and_gradients(head, target, weights.float(), "chunked")
    naive, naive_dx, _ = logp_and_gradients(head, target, weights.bfloat16(), "bf16 logits")
    largest = (wide.x @ wide.weight.T).abs().max()
    error, naive_error = (ours - truth).abs(), (naive - truth).abs()
    assert error.max() <= 1e-6 * largest
    assert error.mean() <= naive_error.mean() / 100
    assert (our_dx - dx).norm() <= 2**-8 * dx.norm() and (our_dweight - dweight).norm() <= 2**-8 * dweight.norm()
    worst, naive_worst = (((g - dx).norm(dim=1) / dx.norm(dim=1)).max() for g in (our_dx, naive_dx))
    assert worst <= 2**-8
    if confident:
        assert (1 - truth.exp()).median() < 1e-4 and naive_worst > 0.5 and naive_worst > 100 * worst


@pytest.mark.parametrize("name", ["logp", "max_logp", "gather", "entropy", "log_sum_p2"])
def test_confident_tokens_keep_their_gradient(name: str) -> None:
    """float32, 1 - p of the target down to 1e-10, where p itself rounds to 1: relative errors of value and gradient row.

    Below 1e-10 the float64 truth, which takes log-softmax as it is, is itself wrong in the sixth digit.
    """
    head, target = bf16_head(32, confident=True)
    results = []
    for dtype, impl in ((torch.float64, "dense"), (torch.float32, "chunked")):
        x = (1.5 * head.x.to(dtype)).requires_grad_()
        value = head_stats(Head(x, head.weight.to(dtype)), [name], target=target, index=target[:, None], impl=impl)[name]
        results.append((value.detach().double().flatten(), torch.autograd.grad(value.sum(), x)[0].double()))
    (truth, slope), (value, gradient) = results
    rows = truth.abs() > 1e-10
    assert rows.sum() > 16 and (truth[rows].abs() < 1e-7).sum() > 4
    assert ((value - truth) / truth)[rows].abs().max() < 5e-5  # logits up to 60 are known to 2e-5, and so is log r
    assert ((gradient - slope).norm(dim=1) / slope.norm(dim=1))[rows].max() < 5e-5


# ------------------------------------------------------------------------------------------------ the same bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_token_has_the_same_bits_in_any_batch_and_schedule(dtype: torch.dtype) -> None:
    n = 300
    x, weight, target = normal(n, 48, seed=1).to(dtype), normal(5000, 48, seed=2).to(dtype), ids(n)
    whole = head_stats(Head(x, weight), ["logp"], target=target)["logp"]
    for rows in (slice(0, 1), slice(0, 33), slice(7, 140), slice(100, 300), slice(299, 300)):
        part = head_stats(Head(x[rows], weight), ["logp"], target=target[rows])["logp"]
        assert torch.equal(part, whole[rows])
    trained = head_stats(Head(x.clone().requires_grad_(), weight.clone().requires_grad_()), ["logp"], target=target)["logp"]
    frozen = head_stats(Head(x.clone().requires_grad_(), weight), ["entropy", "logp"], target=target)["logp"]
    both = head_stats(Head(x, weight), ["logp", "ref_logp", "forward_kl"], target=target, ref=Head(x, weight))
    assert torch.equal(trained, whole) and torch.equal(frozen, whole)
    assert torch.equal(both["logp"], whole) and torch.equal(both["ref_logp"], whole)
    assert both["forward_kl"].abs().max() == 0


@pytest.mark.parametrize("keep", [1, 60_000, 10**9])
def test_held_logits_give_the_same_bits(keep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """None, some, and all tiles; a second backward through the same graph, which finds none, too."""
    products = []
    exact = backward.logits_tile
    monkeypatch.setattr(backward, "logits_tile", lambda *a, **k: products.append(a[2]) or exact(*a, **k))
    head, leaves = cast(policy(softcap=5.0, extra=True, bias=True, vocab=690), torch.float32)
    weights = [normal(N, seed=1).float(), normal(N, seed=2).float()]
    found, counts = [], []
    for held in (0, keep):
        out = head_stats(head, ["logp", "entropy"], target=ids(high=690), workspace=TINY, keep=held)
        total = sum((value * weight).sum() for value, weight in zip(out.values(), weights, strict=True))
        for _ in range(2):
            products.clear()
            found.append([total.detach(), *torch.autograd.grad(total, leaves, retain_graph=True)])
            counts.append(len(products))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    all_tiles = counts[0]
    assert counts == [all_tiles, all_tiles, {1: all_tiles, 10**9: 0}.get(keep, counts[2]), all_tiles]
    assert keep != 60_000 or 0 < counts[2] < all_tiles


# ------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("want", [["logp"], ["logp", "entropy", "reverse_kl"]], ids="+".join)
@pytest.mark.parametrize("frozen", [False, True])
def test_memory_is_the_workspace_whatever_the_number_of_tokens(want: list, frozen: bool) -> None:
    v, workspace = 10_000, 4 << 20
    peaks = {n: peak_bytes(stats_and_gradients(n, v, want, workspace, frozen=frozen)) for n in (1024, 2048)}
    weight, two = 0 if frozen else 4 * v * 16, len(want) > 1
    for n, peak in peaks.items():
        results = weight + 4 * 16 * n * (2 if frozen else 1)
        vectors = 4 * n * (60 if two else 30)
        assert peak <= results + vectors + (2.25 if two else 1.25) * workspace
    assert peaks[2048] - peaks[1024] <= 4 * 1024 * (2 * 16 + 60)  # what grows: dx and vectors, no multiple of V
    assert peaks[2048] < 4 * 2048 * v / (4 if two else 8)  # one set of logits


def test_log_probs_under_a_frozen_head_keep_no_logits() -> None:
    """Four times the vocabulary adds nothing; the logits of one product, 32 tokens, would be another megabyte."""
    peaks = [peak_bytes(stats_and_gradients(64, v, ["logp"], 4 << 20, frozen=True)) for v in (3_000, 12_000)]
    assert peaks[1] - peaks[0] < 1 << 17


# ------------------------------------------------------------------------------------------------ how it is called


def test_no_tokens() -> None:
    head, leaves = cast(policy(n=0, extra=True, bias=True), torch.float32)
    arguments = {"target": ids(0), "index": torch.zeros(0, 3, dtype=torch.int64), "ref": reference(0)}
    out = head_stats(head, EVERYTHING, **arguments)
    assert out["gather"].shape == (0, 3) and all(len(value) == 0 for value in out.values())
    gradients = torch.autograd.grad(sum(value.sum() for value in out.values()), leaves)
    assert all(g.shape == leaf.shape and g.abs().sum() == 0 for g, leaf in zip(gradients, leaves, strict=True))


def test_padding_of_the_vocabulary_is_never_read_and_gets_no_gradient() -> None:
    head, _ = cast(policy(vocab=650), torch.float32)
    with torch.no_grad():
        head.weight[650:] = torch.nan
    head_stats(head, ["logp", "entropy"], target=ids(high=650), workspace=TINY)["logp"].sum().backward()
    assert head.weight.grad.isfinite().all() and head.weight.grad[650:].abs().sum() == 0


def test_removed_items_have_no_probability() -> None:
    head = policy(bias=True)
    out = head_stats(head, ["entropy", "gather"], index=torch.full((N, 1), 70), workspace=TINY)
    assert (out["gather"] == -math.inf).all() and out["entropy"].isfinite().all()


def test_upstream_gradients_that_are_missing_or_zero() -> None:
    head, leaves = cast(policy(), torch.float64)
    out = head_stats(head, ["logp", "entropy", "reverse_kl"], target=ids(), ref=reference())
    alone = head_stats(head, ["logp"], target=ids())
    torch.testing.assert_close(
        torch.autograd.grad(out["logp"].sum(), leaves), torch.autograd.grad(alone["logp"].sum(), leaves), rtol=1e-12, atol=1e-12
    )


def test_strides_ties_and_mixed_dtypes() -> None:
    """Transposed and sliced inputs; one parameter used twice; a float32 parameter under bfloat16 hidden states."""
    weight = normal(24, V, seed=2).float().T.requires_grad_()  # [V, 24], not contiguous
    x = normal(N, 48, seed=1).float()[:, ::2].requires_grad_()
    tied = weight[ids()] * 0.1
    logps = [head_stats(Head(x + tied, weight), ["logp"], target=ids(), impl=impl)["logp"] for impl in ("dense", "chunked")]
    gradients = [torch.autograd.grad(logp.sum(), [x, weight], retain_graph=True) for logp in logps]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-5)
    narrow = x.detach().bfloat16().requires_grad_()
    plain, autocast = (_mixed(narrow, weight, autocast=on) for on in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain, autocast, strict=True))
    logp, dx, dweight = plain
    assert (logp.dtype, dx.dtype, dweight.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    dense = head_stats(Head(narrow, weight), ["logp"], target=ids(), impl="dense")["logp"]
    torch.testing.assert_close(logp, dense.detach(), rtol=1e-5, atol=1e-5)


def _mixed(x: Tensor, weight: Tensor, *, autocast: bool) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logp = head_stats(Head(x, weight), ["logp"], target=ids())["logp"]
        return logp.detach(), *torch.autograd.grad(logp.sum(), [x, weight])


@pytest.mark.parametrize("frozen", [False, True])
def test_a_parameter_whose_data_is_swapped_between_the_passes(frozen: bool) -> None:
    """DeepSpeed ZeRO-3 empties a parameter after its module's forward and gathers it again before its backward."""
    weight = torch.nn.Parameter(normal(V, 12, seed=2), requires_grad=not frozen)
    x, full = normal(N, 12, seed=1).requires_grad_(), weight.data
    leaves = [x] if frozen else [x, weight]
    out = head_stats(Head(x, weight), ["entropy", "logp"], target=ids())
    want = torch.autograd.grad(out["logp"].sum() + out["entropy"].sum(), leaves, retain_graph=True)
    weight.data = torch.empty(0, dtype=torch.float64)
    weight.data = full.clone()
    full.fill_(torch.nan)
    got = torch.autograd.grad(out["logp"].sum() + out["entropy"].sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_nothing_is_left_set_after_an_error() -> None:
    def fails(lp: Tensor, lq: Tensor) -> Tensor:
        raise RuntimeError("boom")

    before = torch.backends.mkldnn.matmul.fp32_precision
    head = cast(policy(), torch.bfloat16)[0]
    with pytest.raises(RuntimeError, match="boom"):
        head_stats(head, [Separable("fails", fails)], ref=cast(reference(), torch.bfloat16)[0])
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize(
    ("want", "change", "message"),
    [
        (["logps"], {}, "no statistic 'logps'; possible: logp, lse"),
        (["lse", "lse"], {}, "names must differ"),
        (["logp"], {"target": None}, "'logp' needs target"),
        (["gather"], {}, "'gather' needs index"),
        (["reverse_kl"], {"ref": None}, "'reverse_kl' needs ref"),
        (["logp"], {"target": ids() + V}, f"outside the vocabulary of {V}"),
        (["logp"], {"target": ids()[:-1]}, r"target: \[44\]"),
        (["ref_logp"], {"ref": reference(v=60)}, "outside the vocabulary of 60"),
        (["lse"], {"ref": reference(N + 1)}, r"ref: x \[46, 20\]"),
        (["lse"], {"head": policy(vocab=V + 1)}, "head.vocab: 701"),
        (["lse"], {"head": policy(temperature=torch.ones(3))}, r"head.temperature: \[3\]"),
    ],
)
def test_mistakes(want: list[str], change: dict, message: str) -> None:
    arguments = {"head": policy(), "target": ids(), "ref": reference(), **change}
    with pytest.raises(ValueError, match=message):
        head_stats(arguments.pop("head"), want, **arguments)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("want", [["logp"], ["logp", "entropy"]])
def test_no_tokens_under_a_head_of_log_probs(want: list[str], trained: bool) -> None:
    """What a process without rows has."""
    x, weight = torch.zeros(0, 5, requires_grad=True), torch.randn(70, 5, requires_grad=trained)
    out = head_stats(Head(x, weight), want, target=torch.zeros(0, dtype=torch.int64))
    assert all(out[name].shape == (0,) for name in want)
    sum(out[name].sum() for name in want).backward()
    assert x.grad.shape == (0, 5)
    assert weight.grad is None if not trained else not weight.grad.any()
