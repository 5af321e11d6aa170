"""RLHF with KL: lessons and losses by hand, PPO's whole step, and what is refused. Parts of it have goldens of their own:
test_importance.py (TRL's GRPO), test_kl.py, test_advantages.py, test_token_weights.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from grids import Grid, read, same, tensor
from random_statistics import random_experience, random_statistics

from posttrain.experience import Experience, Sampled
from posttrain.objectives.online.rlhf import RLHFConfig
from posttrain.registry import find
from posttrain.schema import UserError, parse
from posttrain.stats import Completions, Loss

RLHF = find("rlhf")

SEEN = Experience(
    scores=tensor([1.0, 3.0, 2.0, 2.0]),
    lengths=torch.tensor([2, 1, 1, 2]),
    group=2,
    finished=torch.tensor([True, True, True, False]),
    old_logps=tensor([-1.0, -2.0, -0.5, -1.5, -1.0, -3.0]),
    reference_logps=tensor([-2.0, -1.5, -0.5, -1.0, -2.0, -2.0]),
)
"""Log-ratios 1 and -0.5; 0; -0.5; 1 and -1: the KL of the completions is 0.5, 0, -0.5 and 0."""


def config(**settings: Any) -> RLHFConfig:
    return parse(RLHFConfig, settings, "objective")


def lesson(settings: dict[str, Any], **changes: Any) -> Any:
    return RLHF.lesson(config(**settings), dataclasses.replace(SEEN, **changes))


def sampled(logps: torch.Tensor, old: torch.Tensor, lengths: torch.Tensor, **columns: Any) -> Sampled:
    nothing = torch.zeros(len(old), dtype=torch.float64)
    named = {"advantages": nothing + 1, "weights": nothing + 1, "penalties": nothing, "old_values": nothing, "returns": nothing}
    more = {"entropy": nothing, **columns.pop("more", {})}
    reference = columns.pop("reference_logps", None)
    one = Completions(logps=logps, lengths=lengths, reference_logps=reference, more=more)
    context = columns.pop("context", {})
    return Sampled(completion=one, old_logps=old, **{**named, **columns}, context=context)


def test_rloo_with_the_kl_in_the_reward() -> None:
    """Totals 1 - 0.1 * 0.5, 3, 2 + 0.1 * 0.5, 2; of two completions each is compared with the other."""
    got = lesson({"beta": 0.1})
    same(got.tokens["advantages"], [-2.05, -2.05, 2.05, 0.05, -0.05, -0.05], 1e-12)
    assert got.keep.all() and not got.tokens["penalties"].any() and (got.tokens["weights"] == 1).all()
    same(got.metrics["kl/weight"], 0.1, 1e-12)
    assert got.remember == {}


@pytest.mark.parametrize("advantage", ["rloo", "opo", "reinforce_pp", "gae"])
def test_the_score_of_a_completion_without_tokens_is_nobody_elses(advantage: str) -> None:
    """First and third of six: it moves the baseline of its group, and no token where there is none."""
    lengths = torch.tensor([0, 2, 0, 1, 1, 2])
    more = {"more": {"values": tensor([0.5, 0.0, 1.0, 0.0, 0.0, 0.0])} if advantage == "gae" else {}}
    changes = {"lengths": lengths, "finished": torch.ones(6, dtype=torch.bool), "group": 2, **more}

    def advantages(first: float, third: float) -> torch.Tensor:
        scores = tensor([first, 1.0, third, 3.0, 2.0, 2.0])
        return lesson({"advantage": advantage, "beta": 0.0}, scores=scores, **changes).tokens["advantages"]

    got = advantages(5.0, 7.0)
    if advantage == "rloo":
        same(got, [-4.0, -4.0, -4.0, 0.0, 0.0, 0.0], 1e-12)
    else:  # opo's baseline weighs by length
        same(got, advantages(-5.0, 70.0).tolist(), 1e-12)
    assert got.isfinite().all() and len(got) == 6


def test_without_a_kl_in_the_reward_only_scores_count() -> None:
    for settings in ({"kl": "none"}, {"kl": "loss"}, {"beta": 0.0}):
        same(lesson(settings).tokens["advantages"], [-2.0, -2.0, 2.0, 0.0, 0.0, 0.0], 1e-12)


@pytest.mark.parametrize(
    ("advantage", "expected"),
    [
        ("dr_grpo", [-1.0, -1.0, 1.0, 0.0, 0.0, 0.0]),
        ("grpo", [-1 / (2**0.5 + 1e-4)] * 2 + [1 / (2**0.5 + 1e-4)] + [0.0] * 3),
        ("qae", [0.0, 0.0, 2 / (2**0.5 + 1e-6), 0.0, 0.0, 0.0]),
        ("opo", [1 - 5 / 3] * 2 + [3 - 5 / 3] + [0.0] * 3),
    ],
)
def test_advantages_of_groups(advantage: str, expected: list[float]) -> None:
    same(lesson({"advantage": advantage, "kl": "none"}).tokens["advantages"], expected, 1e-12)


def test_reinforce_pp_gives_each_token_its_own_return() -> None:
    """Rewards of tokens: -0.1, 0.05 + 1; 3; 0.05 + 2; -0.1, 0.1 + 2; whitened over all of them."""
    returns = tensor([0.95, 1.05, 3.0, 2.05, 2.0, 2.1])
    expected = (returns - returns.mean()) / (returns.var() + 1e-8).sqrt()
    same(lesson({"advantage": "reinforce_pp", "beta": 0.1}).tokens["advantages"], expected.tolist(), 1e-12)
    discounted = lesson({"advantage": "reinforce_pp", "beta": 0.1, "gamma": 0.5}).tokens["advantages"]
    returns = tensor([-0.1 + 0.5 * 1.05, 1.05, 3.0, 2.05, -0.1 + 0.5 * 2.1, 2.1])
    same(discounted, ((returns - returns.mean()) / (returns.var() + 1e-8).sqrt()).tolist(), 1e-12)


def test_a_missing_end_is_masked_or_costs() -> None:
    assert lesson({"mask_truncated": True}).keep.tolist() == [True, True, True, False]
    got = lesson({"missing_end_penalty": 1.5, "kl": "none"})
    same(got.tokens["advantages"], [-2.0, -2.0, 2.0, 1.5, -1.5, -1.5], 1e-12)
    assert got.keep.all()


def test_dynamic_sampling_leaves_out_prompts_that_teach_nothing() -> None:
    got = lesson({"dynamic_sampling": True})
    assert got.keep.tolist() == [True, True, False, False]
    same(got.metrics["groups/alike"], [0.0, 1.0], 0)
    whitened = lesson({"dynamic_sampling": True, "advantage": "reinforce_pp", "kl": "none"}).tokens["advantages"][:3]
    same(whitened.sum(), 0.0, 1e-12)  # over what is learned from


def test_the_weights_of_an_engine_that_is_off() -> None:
    engine = SEEN.old_logps - tensor([0.0, 1.0, -1.0, 0.5, 0.0, 0.0])
    weights = lesson({}, engine_logps=engine).tokens["weights"]
    same(weights, tensor([0.0, 1.0, -1.0, 0.5, 0.0, 0.0]).exp().clamp(max=2).tolist(), 1e-12)
    got = lesson({"correction": "token_mask", "correction_bounds": [0.5, 2.0]}, engine_logps=engine)
    same(got.tokens["weights"], tensor([0.0, -torch.inf, -torch.inf, 0.5, 0.0, 0.0]).exp().tolist(), 1e-12)
    same(got.metrics["mismatch/gap"], [0.0, 1.0, 1.0, 0.5, 0.0, 0.0], 1e-12)
    assert (lesson({"correction": "none"}, engine_logps=engine).tokens["weights"] == 1).all()


def test_the_loss_is_exact_on_policy() -> None:
    """Ratios are 1, so values are minus the advantages and gradients minus the advantages, in float32."""
    logps = torch.log(torch.rand(6)).requires_grad_()
    columns = {"advantages": torch.randn(6), "reference_logps": torch.zeros(6)}
    loss = RLHF(config(), sampled(logps, logps.detach(), SEEN.lengths, **columns))
    assert loss.per == "completion" and torch.equal(loss.values, -columns["advantages"].double() * 1.0)
    assert torch.equal(torch.autograd.grad(loss.values.sum(), logps)[0], -columns["advantages"])
    assert (loss.metrics["ratio"] == 1).all() and not loss.metrics["clip/low"].any()


GOLDEN = read("grpo_trl_losses")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("grpo", {"mean": "sequences"}),
        ("dapo", {}),
        ("dr_grpo", {"mean": "constant", "constant": 8.0}),
        ("dapo_clip_higher_0.28", {"clip_high": 0.28}),
        ("dapo_delta_1.5", {"clip_dual": 1.5}),
        ("gspo_grpo_sequence_level", {"mean": "sequences", "ratio": "sequence_mean"}),
        ("grpo_beta0.04_k3_plain", {"mean": "sequences", "kl": "loss", "kl_estimate": "k3", "beta": 0.04}),
        ("grpo_beta0.04_k3_bias_corrected", {"mean": "sequences", "kl": "loss", "kl_estimate": "ratio_k3", "beta": 0.04}),
        ("dapo_with_rollout_is", {}),
    ],
)
def test_trl_golden(name: str, settings: dict[str, Any]) -> None:
    """The whole objective, in value and gradient."""
    given, grid = GOLDEN["inputs"], Grid(GOLDEN["inputs"]["completion_mask"])
    leaf = tensor(given["new_logps"]).requires_grad_()
    one = grid.completions(leaf, tensor(given["ref_logps"]))
    columns = {"advantages": one.spread(tensor(given["advantages"])), "reference_logps": one.reference_logps}
    if name == "dapo_with_rollout_is":
        columns["weights"] = grid.flat(given["rollout_importance_ratio"])
    settings = settings if "kl" in settings else {"kl": "none", **settings}
    loss = RLHF(config(**settings), sampled(one.logps, grid.flat(given["old_logps"]), one.lengths, **columns))
    same(loss.values.mean(), GOLDEN["outputs"][name]["loss"])
    same(torch.autograd.grad(loss.values.mean(), leaf)[0], GOLDEN["outputs"][name]["grad"])


def test_rloo_of_whole_completions() -> None:
    """TRL's RLOO: one ratio a completion, the product over its tokens, clipped: means by completion of equal values."""
    old, lengths = SEEN.old_logps, SEEN.lengths
    logps = (old + tensor([0.1, 0.2, 0.5, -0.1, 0.05, -0.02])).requires_grad_()
    advantages = tensor([-1.0, 2.0, 1.0, -0.5])
    columns = {"advantages": advantages.repeat_interleave(lengths)}
    loss = RLHF(config(ratio="sequence", mean="sequences"), sampled(logps, old, lengths, **columns))
    r = tensor([0.3, 0.5, -0.1, 0.03]).exp()
    same(loss.values, [r[0].item(), -2 * 1.2, -r[2].item(), 0.5 * r[3].item()], 1e-12)
    expected = [r[0].item()] * 2 + [0.0, -r[2].item()] + [0.5 * r[3].item()] * 2
    same(torch.autograd.grad(loss.values.sum(), logps)[0], expected, 1e-12)


def test_sums_by_completion() -> None:
    loss = RLHF(config(mean="sequence_sums"), sampled(SEEN.old_logps, SEEN.old_logps, SEEN.lengths))
    assert loss.per == "row"
    same(loss.values, [-2.0, -1.0, -1.0, -2.0], 0)


def test_the_kl_in_the_loss() -> None:
    """beta times the sum over the vocabulary, whose weight may come from the controller."""
    k = tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]).requires_grad_()
    options = {"more": {"reverse_kl": k}, "reference_logps": SEEN.reference_logps}
    statistics = sampled(SEEN.old_logps, SEEN.old_logps, SEEN.lengths, **options)
    loss = RLHF(config(kl="loss", beta=0.5), statistics)
    same(loss.values, (0.5 * k - 1).tolist(), 1e-12)
    adapted = dataclasses.replace(statistics, context={"kl_weight": torch.tensor(2.0)})
    same(RLHF(config(kl="loss", beta=0.5, kl_target=1.0), adapted).values, (2 * k - 1).tolist(), 1e-12)
    both = RLHF(config(kl_estimate="analytic", beta=0.5), statistics)
    same(both.values, (0.5 * k - 1).tolist(), 1e-12)
    got = lesson({"kl_estimate": "analytic", "beta": 0.5}, more={"reverse_kl": k.detach()})
    same(got.tokens["advantages"], [-2 - 0.5 * 0.0] * 2 + [2.0] + [0.5 * 0.7] * 1 + [-0.5 * 0.7] * 2, 1e-12)


def test_the_entropy_bonus_and_its_controller() -> None:
    entropy = tensor([0.5, 1.0, 1.5, 2.0, 2.5, 3.0])
    statistics = sampled(SEEN.old_logps, SEEN.old_logps, SEEN.lengths, more={"entropy": entropy})
    loss = RLHF(config(entropy_bonus=0.1), statistics)
    same(loss.values, (-1 - 0.1 * entropy).tolist(), 1e-12)
    adaptive = config(entropy_bonus=1e-3, entropy_range=[0.05, 0.23])
    assert RLHF.state(adaptive, {}, {}) == {"entropy_weight": 1e-3}
    after = RLHF.state(adaptive, {"entropy_weight": 2e-3}, {"entropy_of_step": 0.4})
    assert after == {"entropy_weight": pytest.approx(2e-3 - 1e-3 * 0.17)}
    later = dataclasses.replace(statistics, context={"entropy_weight": torch.tensor(2e-3, dtype=torch.float64)})
    got = RLHF(adaptive, later)
    same(got.values, (-1 - 2e-3 * entropy).tolist(), 1e-12)
    assert torch.equal(got.remember["entropy_of_step"], entropy)


def test_the_adaptive_weight_learns_of_a_round() -> None:
    adaptive = config(kl_target=0.1, beta=0.2)
    assert RLHF.state(adaptive, {}, {}) == {"kl_weight": 0.2}
    got = RLHF.lesson(adaptive, dataclasses.replace(SEEN, context={"kl_weight": torch.tensor(0.2)}))
    same(got.remember["kl_of_round"], [0.5, 0.0, -0.5, 0.0], 1e-12)
    assert got.remember["episodes"].tolist() == [4.0]
    assert RLHF.state(adaptive, {"kl_weight": 0.2}, {}) == {"kl_weight": 0.2}  # a step that begins no round
    after = RLHF.state(adaptive, {"kl_weight": 0.2}, {"kl_of_round": 0.0, "episodes": 4.0})
    assert after == {"kl_weight": pytest.approx(0.2 * (1 - 0.2 * 4 / 10000))}
    assert RLHF.state(config(), {}, {}) == {}


def test_ppo_by_hand() -> None:
    """KL in the reward, gae, whitening, clipped policy and clipped critic, of one completion of 2 tokens and one of 1."""
    values = tensor([0.5, 0.2, 1.0])
    seen = dataclasses.replace(
        SEEN,
        scores=tensor([1.0, 2.0]),
        lengths=torch.tensor([2, 1]),
        group=1,
        finished=torch.tensor([True, True]),
        old_logps=tensor([-1.0, -2.0, -0.5]),
        reference_logps=tensor([-2.0, -1.5, -0.5]),
        more={"values": values, "entropy": values},
    )
    settings = config(advantage="gae", beta=0.1, gamma=0.9, lam=0.8)
    got = RLHF.lesson(settings, seen)
    d = [-0.1 + 0.9 * 0.2 - 0.5, 1.05 - 0.2, 2.0 - 1.0]
    raw = tensor([d[0] + 0.72 * d[1], d[1], d[2]])
    same(got.tokens["returns"], (raw + values).tolist(), 1e-12)
    same(got.tokens["old_values"], values.tolist(), 0)
    white = (raw - raw.mean()) / (raw.var() + 1e-8).sqrt()
    same(got.tokens["advantages"], white.tolist(), 1e-12)
    now = tensor([0.9, 0.1, 1.1])
    one = Completions(logps=seen.old_logps, lengths=seen.lengths, more={"values": now, "entropy": now})
    loss = RLHF(settings, Sampled(completion=one, **got.tokens))
    returns, near = raw + values, values + (now - values).clamp(-0.2, 0.2)
    critic = torch.maximum((now - returns) ** 2, (near - returns) ** 2) / 2
    same(loss.values, (-white + 0.1 * critic).tolist(), 1e-12)


def test_the_critic_starts_at_0_and_reads_hidden_states() -> None:
    settings = config(advantage="gae")
    seen = random_experience(RLHF, settings)
    assert not seen.more["values"].eq(0).all()  # the random ones of the tests are moved
    assert RLHF.learned.start(config(), None) == {}
    statistics = random_statistics(Sampled, want=RLHF.want(settings))
    hidden = statistics.completion.policy
    one = dataclasses.replace(statistics.completion, more={"hidden": hidden})
    own = {"value": torch.cat([torch.ones(hidden.shape[1]), torch.tensor([0.5])]).double()}
    same(RLHF.learned.statistics(settings, own, one)["values"], (hidden.sum(1) + 0.5).tolist(), 1e-12)


@pytest.mark.parametrize("method", ["steer", "clip_cov", "kl_cov"])
def test_token_weights_reach_the_loss(method: str) -> None:
    """On policy the loss is minus advantage times weight; kl_cov's penalty acts once the policy has moved."""
    settings = config(token_weights=method, correction="none", **({} if method == "steer" else {"cov_share": 0.3}))
    if method == "clip_cov":
        settings = dataclasses.replace(settings, cov_bounds=(-5.0, 5.0))
    seen = random_experience(RLHF, settings)
    got = RLHF.lesson(settings, seen)
    tokens, n = got.tokens, len(seen.old_logps)
    moved = (seen.old_logps - 0.3).requires_grad_()
    statistics = Sampled(completion=Completions(logps=moved, lengths=seen.lengths, more={"entropy": moved}), **tokens)
    loss = RLHF(settings, statistics)
    free = dataclasses.replace(settings, token_weights="none", cov_share=None, cov_bounds=(1.0, 5.0))
    plain = RLHF(free, dataclasses.replace(statistics, weights=torch.ones(n), penalties=torch.zeros(n))).values
    if method == "kl_cov":
        held = tokens["penalties"]
        assert held.sum() == int(0.3 * n) and (tokens["weights"] == 1).all()
        same(loss.values, (-tokens["advantages"] * torch.tensor(-0.3).double().exp() + 0.3 * held).tolist(), 1e-7)
    else:
        least = {"steer": 0.8, "clip_cov": 0.0}[method]
        assert tokens["weights"].min() == pytest.approx(least, abs=1e-12) and tokens["weights"].max() <= 1
        same(loss.values, (plain * tokens["weights"]).tolist(), 1e-12)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kl": "loss", "kl_estimate": "k1"}, "k1 in the loss has no gradient on average"),
        ({"kl_estimate": "k3"}, "k3 in the reward has not the KL's gradient; possible: k1, analytic"),
        ({"kl": "none", "beta": 0.1}, "beta is for kl = reward or loss and would be ignored"),
        ({"quantile": 0.6}, "quantile is for advantage = qae and would be ignored"),
        ({"correction": "none", "correction_bounds": [0.0, 2.0]}, "correction_bounds is for correction = token_truncate"),
        ({"mean": "constant"}, "mean = constant needs `constant`"),
        ({"token_weights": "kl_cov", "clip_high": 0.28}, "token_weights = kl_cov takes their place"),
        ({"entropy_drop": 0.2}, "entropy_drop needs an entropy_bonus"),
        ({"clip_low": 1.5}, "clip_low = 1.5"),
    ],
)
def test_refused_in_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=r"^objective: ") as error:
        config(**settings)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_group_of_one_has_nothing_to_compare_with() -> None:
    with pytest.raises(UserError, match="group_size = 1"):
        lesson({}, group=1)
    assert lesson({"advantage": "reinforce_pp"}, group=1).keep.all()


def test_what_the_vocabulary_is_asked_for() -> None:
    names = lambda **settings: [w if isinstance(w, str) else w.name for w in RLHF.want(config(**settings))]  # noqa: E731
    assert names() == ["entropy"] and names(kl="loss") == ["entropy", "reverse_kl"]
    assert names(entropy_bonus=0.1, entropy_drop=0.2) == ["entropy", "kept_entropy"]
    assert RLHF.reads_reference(config()) and not RLHF.reads_reference(config(kl="none"))


def test_warnings() -> None:
    assert RLHF.watch(config(), {"groups/alike": 0.5, "mismatch/left_out": 0.01}) == []
    assert len(RLHF.watch(config(), {"groups/alike": 0.95, "mismatch/left_out": 0.2})) == 2


def test_extremes_are_finite() -> None:
    """Log-ratios of +-1000 in float32."""
    logps = torch.tensor([-1.0, -1001.0], requires_grad=True)
    old, reference = torch.tensor([-1001.0, -1.0]), torch.tensor([-501.0, -1.0])
    for estimate in ("k2", "k3", "ratio_k3"):
        columns = {"advantages": torch.tensor([-1.0, -1.0]), "reference_logps": reference}
        loss: Loss = RLHF(config(kl="loss", kl_estimate=estimate), sampled(logps, old, torch.tensor([2]), **columns))
        (gradient,) = torch.autograd.grad(loss.values.sum(), logps)
        assert loss.values.isfinite().all() and gradient.isfinite().all(), estimate
