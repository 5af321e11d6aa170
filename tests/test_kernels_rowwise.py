"""Statistics of whole rows, and gradients taken in the forward: equal to the dense definition, whatever the options."""

from __future__ import annotations

import pytest
import torch
from heads import (
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
)
from posttrain_kernels import KLS, Rowwise, Separable, head_stats
from torch import Tensor

from posttrain.divergences import divergence


def adaptive(lp: Tensor, lq: Tensor, target: Tensor | None) -> Tensor:
    """Weights from the likelier half of the reference's items, as in AKL: needs a sort, so it is no sum over items."""
    with torch.no_grad():
        p, gap = lq.exp(), (lq.exp() - lp.exp()).abs()
        sorted_p, order = p.sort(-1, descending=True)
        inside = (sorted_p.cumsum(-1) - sorted_p < 0.5).to(p.dtype)
        share = (gap.gather(1, order) * inside).sum(-1) / gap.sum(-1)
    forward, reverse = (p * (lq - lp)).sum(-1), (lp.exp() * (lp - lq)).sum(-1)
    return share * forward + (1 - share) * reverse


def without_target(lp: Tensor, lq: Tensor, target: Tensor | None) -> Tensor:
    """KL(reference || policy) of what both say of the items that are not the target."""
    others = torch.ones_like(lp).scatter(1, target[:, None], 0).bool()
    mine, other = (values.masked_fill(~others, -1e4).log_softmax(-1) for values in (lp, lq))
    return (other.exp() * (other - mine)).sum(-1)


ROWWISE = [Rowwise("adaptive", adaptive), Rowwise("without_target", without_target, temporaries=4)]
OWN = Rowwise("margin", lambda lp, lq, target: lp.topk(2).values.diff(dim=-1).squeeze(1))
MIXED = ["logp", "entropy", ROWWISE[0], "reverse_kl", "gather", ROWWISE[1], Separable("js", divergence("js").summand)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option(options: dict, dtype: torch.dtype) -> None:
    for workspace in (TINY, 100_000, None):
        assert_equal_to_dense(policy(**options), MIXED, dtype, workspace=workspace, ref=reference())


@pytest.mark.parametrize("options", ["plain", "all"])
@pytest.mark.parametrize("entry", [*ROWWISE, OWN], ids=lambda entry: entry.name)
def test_alone_trained_and_frozen(entry: Rowwise, options: str) -> None:
    for needs in ({}, {"weight": False}, {"x": False}):
        assert_equal_to_dense(policy(**OPTIONS[options]), [entry], torch.float64, ref=reference(), workspace=50_000, **needs)


def test_frozen_head_with_others() -> None:
    """The log-prob by the row-scale schedule, the others deferred; or the other way about."""
    for eager in (None, "adaptive"):
        arguments = {"ref": reference(), "weight": False, "eager": eager}
        assert_equal_to_dense(policy(extra=True), ["logp", *ROWWISE], torch.float64, **arguments)


@pytest.mark.parametrize(("v", "w"), [(V, 500), (500, V), (V, 640)])
def test_vocabularies_are_cut_to_the_common_part(v: int, w: int) -> None:
    seen = []

    def sizes(lp: Tensor, lq: Tensor, target: Tensor | None) -> Tensor:
        seen.append((lp.shape[1], lq.shape[1]))
        return without_target(lp, lq, target)

    want = ["logp", Rowwise("sizes", sizes), ROWWISE[0], "entropy"]
    assert_equal_to_dense(policy(v=v), want, torch.float64, ref=reference(v=w), workspace=TINY)
    assert set(seen) == {(min(v, w), min(v, w))}


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "js"])
def test_a_sum_over_items_is_the_same_either_way(name: str) -> None:
    summand = KLS[name].f if name in KLS else divergence(name).summand
    either = [Separable("sum", summand), Rowwise("rows", lambda lp, lq, target: summand(lp, lq).sum(-1))]
    head, leaves = cast(policy(**OPTIONS["all"]), torch.float64)
    out = head_stats(head, either, ref=reference(), workspace=TINY)
    torch.testing.assert_close(out["sum"], out["rows"], rtol=1e-12, atol=1e-12)
    weights = normal(N, seed=20)
    gradients = [torch.autograd.grad((out[key] * weights).sum(), leaves, retain_graph=True) for key in ("sum", "rows")]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-11)


def test_without_a_reference() -> None:
    """lq is None, and the vocabulary is the head's own."""

    def entropy(lp: Tensor, lq: Tensor | None, target: Tensor | None) -> Tensor:
        assert lq is None and target is None and lp.shape[1] == V
        return -(lp.exp() * lp).sum(-1)

    head, leaves = cast(policy(softcap=3.0), torch.float64)
    out = head_stats(head, ["entropy", Rowwise("same", entropy), OWN], workspace=TINY)
    torch.testing.assert_close(out["same"], out["entropy"], rtol=1e-12, atol=1e-12)
    first, second = (torch.autograd.grad(out[key].sum(), leaves, retain_graph=True) for key in ("entropy", "same"))
    torch.testing.assert_close(first, second, rtol=1e-11, atol=1e-11)
    likeliest = (head.x @ head.weight.T).div(3).tanh().mul(3).topk(2).values
    torch.testing.assert_close(out["margin"], likeliest[:, 1] - likeliest[:, 0])


def test_no_gradient_flows_through_what_f_does_not_differentiate() -> None:
    outside = torch.ones((), dtype=torch.float64, requires_grad=True)
    constants = [
        Rowwise("reference_entropy", lambda lp, lq, target: -(lq.exp() * lq).sum(-1)),
        Rowwise("outside", lambda lp, lq, target: outside * lq[:, 0]),
    ]
    head, leaves = cast(policy(), torch.float64)
    for want in (constants, ["logp", *constants]):
        out = head_stats(head, want, target=ids(), ref=reference(), workspace=TINY)
        gradients = torch.autograd.grad(out["reference_entropy"].sum() + out["outside"].sum(), leaves)
        assert all(gradient.abs().sum() == 0 for gradient in gradients) and outside.grad is None
    other = head_stats(reference(), ["entropy"])["entropy"]
    torch.testing.assert_close(out["reference_entropy"].detach(), other)


@pytest.mark.parametrize("eager", [None, "adaptive"])
def test_bfloat16_inputs(eager: str | None) -> None:
    """float32 logits, and dW summed in float32 over the blocks of tokens: gradients within 2^-8 of the float64 truth."""
    narrow, leaves = cast(policy(h=16, extra=True), torch.bfloat16)
    ref = cast(reference(), torch.bfloat16)[0]
    wide, wide_leaves = cast(narrow, torch.float64)
    got = head_stats(narrow, ROWWISE[:1], ref=ref, workspace=TINY, eager=eager)["adaptive"]
    want = head_stats(wide, ROWWISE[:1], ref=cast(ref, torch.float64)[0], impl="dense")["adaptive"]
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    gradients, truth = torch.autograd.grad(got.mean(), leaves), torch.autograd.grad(want.mean(), wide_leaves)
    for gradient, true in zip(gradients, truth, strict=True):
        assert gradient.dtype == torch.bfloat16 and (gradient - true).norm() <= 2**-8 * true.norm()


def test_one_number_for_each_token() -> None:
    wrong = Rowwise("wrong", lambda lp, lq, target: lp.exp())
    for impl in ("dense", "chunked"):
        with pytest.raises(ValueError, match=r"'wrong' gave \[\d+, 700\], expected \[\d+\]"):
            head_stats(policy(), [wrong], impl=impl)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_block_is_seen_in_pieces_that_fit(frozen: bool) -> None:
    """What f holds, `temporaries` rows a token, fits a quarter of the workspace for any number of tokens; it sees each once."""
    lengths = []

    def f(lp: Tensor, lq: Tensor, target: Tensor | None) -> Tensor:
        lengths.append(len(lp))
        return lp[:, 0]

    v, workspace = 1000, 1_000_000
    for n in (70, 300):
        head, leaves = cast(policy(n=n, v=v), torch.float32, weight=not frozen)
        lengths.clear()
        out = head_stats(
            head, [Rowwise("f", f, temporaries=10)], ref=cast(reference(n, v), torch.float32)[0], workspace=workspace
        )
        assert sum(lengths) == n and max(lengths) == workspace // 4 // (10 * 4 * v) == 6
        torch.autograd.grad(out["f"].sum(), leaves)
        assert sum(lengths) == (n if frozen else 2 * n)


# ------------------------------------------------------------------------------------------------ gradients in the forward

EAGER = ["logp", "entropy", "reverse_kl", Separable("js", divergence("js").summand), *ROWWISE]


@pytest.mark.parametrize("upstream", ["equal", "different", "missing"])
@pytest.mark.parametrize("options", ["plain", "all"])
@pytest.mark.parametrize("eager", ["logp", "entropy", "reverse_kl", "js", "adaptive", "without_target"])
def test_eager_is_exact_whatever_comes_from_upstream(eager: str, options: str, upstream: str) -> None:
    """Alone and beside others, whose gradients wait for the backward."""
    head, leaves = cast(policy(**OPTIONS[options]), torch.float64)
    alone = [entry for entry in EAGER if eager == (entry if isinstance(entry, str) else entry.name)]
    weight = {"equal": torch.tensor(-0.3).double(), "different": normal(N, seed=21), "missing": None}[upstream]
    for want in (alone, EAGER):
        gradients = []
        for name, impl in ((eager, "chunked"), (None, "dense")):
            out = head_stats(head, want, target=ids(high=690), ref=reference(), workspace=TINY, impl=impl, eager=name)
            losses = [(out[key] * (i + 1)).mean() for i, key in enumerate(out) if key != eager]
            losses += [] if weight is None else [(out[eager] * weight).sum()]
            if losses:
                gradients.append(torch.autograd.grad(sum(losses), leaves))
        if gradients:
            torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_eager_projects_once() -> None:
    """Each token's rows are read once where the upstream gradients are equal, twice where they are not."""
    seen = []

    def f(lp: Tensor, lq: Tensor, target: Tensor | None) -> Tensor:
        seen.append(len(lp))
        return (lp.exp() * (lp - lq)).sum(-1)

    for weights, times in ((torch.full((N,), 0.1).double(), 1), (normal(N, seed=22), 2)):
        head, leaves = cast(policy(), torch.float64)
        seen.clear()
        out = head_stats(head, [Rowwise("f", f)], ref=reference(), workspace=TINY, eager="f")["f"]
        torch.autograd.grad(out, leaves, weights)
        assert sum(seen) == times * N


def test_eager_twice_through_one_graph() -> None:
    head, leaves = cast(policy(), torch.float64)
    out = head_stats(head, ["reverse_kl"], ref=reference(), workspace=TINY, eager="reverse_kl")["reverse_kl"]
    first, second = (torch.autograd.grad(out.mean(), leaves, retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("entry", ["reverse_kl", ROWWISE[0]], ids=["reverse_kl", "adaptive"])
def test_eager_with_a_trained_adapter_on_a_frozen_head(entry: str | Rowwise) -> None:
    """LoRA on the head: of the weights only that of the extra term gets a gradient."""
    head, _ = cast(policy(extra=True), torch.float64, weight=False)
    head.extra[0][1].requires_grad_()
    leaves = [head.x, *head.extra[0]]
    name = entry if isinstance(entry, str) else entry.name
    outs = [head_stats(head, [entry], ref=reference(), workspace=TINY, eager=eager)[name] for eager in (name, None)]
    torch.testing.assert_close(*(torch.autograd.grad(out.mean(), leaves) for out in outs), rtol=1e-11, atol=1e-11)


def test_no_tokens() -> None:
    for eager in (None, "adaptive"):
        head, leaves = cast(policy(n=0, extra=True, bias=True), torch.float32)
        out = head_stats(head, [*ROWWISE, OWN], target=ids(0), ref=cast(reference(0), torch.float32)[0], eager=eager)
        assert all(value.shape == (0,) for value in out.values())
        gradients = torch.autograd.grad(sum(value.sum() for value in out.values()), leaves)
        assert all(g.shape == leaf.shape and g.abs().sum() == 0 for g, leaf in zip(gradients, leaves, strict=True))


@pytest.mark.parametrize("eager", ["gather", "argmax", "lse"])
def test_eager_must_be_one_gradient_of_what_is_wanted(eager: str) -> None:
    with pytest.raises(ValueError, match=f"eager: '{eager}' is not a wanted statistic with one gradient"):
        head_stats(policy(), ["gather", "argmax"], index=ids(k=2), eager=eager)


# ------------------------------------------------------------------------------------------------ memory

LIGHT = Rowwise("light", lambda lp, lq, target: (lp.exp() * (lp - lq)).sum(-1))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("want", "eager"), [(["logp", LIGHT], None), ([LIGHT], "light"), (["reverse_kl"], "reverse_kl"), (["logp"], "logp")]
)
def test_memory_is_the_workspace_whatever_the_number_of_tokens(want: list, eager: str | None, frozen: bool) -> None:
    v, workspace = 10_000, 4 << 20
    peaks = {n: peak_bytes(stats_and_gradients(n, v, want, workspace, frozen=frozen, eager=eager)) for n in (512, 1024)}
    weight = 0 if frozen else 4 * v * 16
    for n, peak in peaks.items():
        assert peak <= weight + 4 * n * (2 * 16 + 60) + (3.25 if LIGHT in want else 2.25) * workspace
    assert peaks[1024] - peaks[512] <= 4 * 512 * (2 * 16 + 60)  # what grows: dx and vectors, no multiple of V
    assert peaks[1024] < 4 * 1024 * v / 2  # half of one set of logits


def test_eager_makes_no_gradients_that_nobody_needs() -> None:
    """Without grad mode or anything to train, dW is never allocated; here it is larger than everything else together."""
    v, h = 4000, 512
    frozen, _ = cast(policy(n=64, v=v, h=h), torch.float32, x=False, weight=False)
    trained, _ = cast(frozen, torch.float32)

    def call(head, grad: bool) -> int:
        with torch.set_grad_enabled(grad):
            return peak_bytes(lambda: head_stats(head, ["logp"], target=ids(64), workspace=1 << 20, eager="logp"))

    assert max(call(frozen, True), call(trained, False)) < 4 * v * h / 2 < call(trained, True)


def spread(lp: Tensor, lq: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """A margin, and beside it how far the reference's reaches and the policy's entropy."""
    return lp.topk(2).values.diff(dim=-1).squeeze(1), lq.amax(-1) - lq.mean(-1), -(lp.exp() * lp).sum(-1)


@pytest.mark.parametrize("eager", [None, "spread"])
@pytest.mark.parametrize("impl", ["dense", "chunked"])
@pytest.mark.parametrize("trained", [True, False])
def test_further_numbers_come_with_the_value_and_have_no_gradient(impl: str, eager: str | None, trained: bool) -> None:
    entry = Rowwise("spread", spread, also=("reach", "entropy of the common"))
    head, leaves = cast(policy(v=V + 20), torch.float64, weight=trained)
    got = head_stats(head, ["logp", entry], target=ids(), ref=reference(), workspace=TINY, impl=impl, eager=eager)
    plain = head_stats(head, ["logp", Rowwise("spread", lambda *rows: spread(*rows)[0])], target=ids(), ref=reference())
    assert list(got) == ["logp", "spread", *entry.also]
    assert not any(got[name].requires_grad for name in entry.also)
    rows = [(one.x @ one.weight[:V].mT).log_softmax(-1) for one in (head, reference())]
    for name, expected in zip(["spread", *entry.also], spread(*rows, None), strict=True):
        torch.testing.assert_close(got[name], expected, rtol=1e-10, atol=1e-10)
    ours, theirs = (torch.autograd.grad((one["spread"] * 0.1).sum(), leaves) for one in (got, plain))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_further_numbers_have_names() -> None:
    entry = Rowwise("spread", spread, also=("spread", "other"))
    with pytest.raises(ValueError, match="names must differ"):
        head_stats(policy(), [entry], ref=reference())
    with pytest.raises(ValueError):
        head_stats(policy(), [Rowwise("spread", spread, also=("reach",))], ref=reference())
