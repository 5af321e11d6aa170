"""RLHF with KL: policy optimisation on the policy's own completions, held to a reference (PPO, RLOO, GRPO, REINFORCE++, ...).

    J = E r(x, y) - beta KL(policy || reference),   KL = E sum_t log policy(y_t) - log reference(y_t)

has its maximum at reference(y | x) exp(r / beta) / Z(x). The loss of a token that was sampled is

    loss_t = w_t surrogate(ratio_t, A_t) + beta k_t - c H_t + v (critic's loss),   ratio = policy / old policy

surrogate: PPO's clip (importance.py); A: advantages.py; w: corrects for an engine that samples otherwise than the trainer
computes (importance.py), and may count tokens less that make the policy surer (token_weights.py); k: kl.py, whose table says
which placements have the gradient of J. `kl: reward`, the default, takes beta (log old - log reference) off the reward of each
token before advantages are taken of it, and is exact. `kl: loss` adds beta k to the loss, by default the sum over the
vocabulary at each token, which leaves out what a token does to the KL of later ones; GRPO's k3 there has the gradient of the
forward KL.

Everything but surrogate, k, H and critic is fixed once for a round, over all its completions on all processes. The advantages
of groups (rloo, grpo, dr_grpo, opo, qae) are of whole completions, score minus beta times their whole KL; reinforce_pp and gae
are of tokens. With the KL in the loss grpo and qae weigh it against scores by their deviation, and dr_grpo against
(G - 1) / G of the score, since a group's mean has the score itself in it; in the reward it is scaled with the score.

A completion without tokens (`sampling.stop`) is compared with and counts in means over completions; no token learns from it.

Source: Ziegler et al. 2019, arXiv:1909.08593, and Ouyang et al. 2022, arXiv:2203.02155 (PPO with the KL in the reward); the
rest: see the files named. Means by tokens and completions, dynamic_sampling, mask_truncated: Yu et al. 2025, "DAPO",
arXiv:2503.14476; by a constant: Liu et al. 2025, "Dr. GRPO", arXiv:2503.20783.
Value at policy == reference: minus the mean advantage, and what is added, which depends on the data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Lt

from ... import advantages as estimators
from ...experience import Experience, Lesson, Sampled
from ...importance import BOUNDS, correction, mismatch, power, ratio, surrogate
from ...kl import REFUSED_IN_LOSS, adapted, in_loss
from ...registry import objective
from ...schema import NonNegative, OpenUnit, Positive, Probability, UserError
from ...stats import Completions, Learned, Loss, Rowwise, Sizes, Want, wide
from ...token_weights import clip_cov, covariance, entropy_change, entropy_weight, kept_entropy, kl_cov, steer

GROUPED: Mapping[str, Callable[[RLHFConfig, torch.Tensor, int, torch.Tensor], torch.Tensor]] = {
    "rloo": lambda config, scores, group, lengths: estimators.rloo(scores, group),
    "grpo": lambda config, scores, group, lengths: estimators.grpo(scores, group),
    "dr_grpo": lambda config, scores, group, lengths: estimators.dr_grpo(scores, group),
    "opo": lambda config, scores, group, lengths: estimators.opo(scores, group, lengths),
    "qae": lambda config, scores, group, lengths: estimators.qae(scores, group, config.quantile),
    "reinforce_pp_baseline": lambda config, scores, group, lengths: estimators.dr_grpo(scores, group),
}
"""The advantages that compare the completions of a prompt; the last one is whitened besides."""

_BELONGS = {
    "quantile": ("advantage", ["qae"]),
    "gamma": ("advantage", ["reinforce_pp", "gae"]),
    "lam": ("advantage", ["gae"]),
    "value_weight": ("advantage", ["gae"]),
    "value_clip": ("advantage", ["gae"]),
    "value_learning_rate": ("advantage", ["gae"]),
    "beta": ("kl", ["reward", "loss"]),
    "kl_estimate": ("kl", ["reward", "loss"]),
    "kl_target": ("kl", ["reward", "loss"]),
    "constant": ("mean", ["constant"]),
    "steer_least": ("token_weights", ["steer"]),
    "cov_share": ("token_weights", ["kl_cov", "clip_cov"]),
    "cov_bounds": ("token_weights", ["clip_cov"]),
    "cov_weight": ("token_weights", ["kl_cov"]),
    "correction_bounds": ("correction", list(BOUNDS)),
}
"""Setting -> the setting that it belongs to, and the values for which it says something."""

_COV_SHARE = {"kl_cov": 2e-3, "clip_cov": 2e-4}


@dataclass(frozen=True, kw_only=True)
class RLHFConfig:
    """Settings of RLHF with KL."""

    advantage: Literal["rloo", "grpo", "dr_grpo", "opo", "qae", "reinforce_pp", "reinforce_pp_baseline", "gae"] = "rloo"
    """What says how good a completion or token was; gae trains a critic beside the policy (PPO)."""

    beta: NonNegative = 0.05
    """Weight of the KL; larger keeps the policy nearer to the reference."""

    kl: Literal["reward", "loss", "none"] = "reward"
    """Where the KL goes: into the reward of each token, into the loss, or nowhere, which needs no reference."""

    kl_estimate: Literal["k1", "k2", "k3", "ratio_k3", "analytic"] | None = None
    """What stands for it: k1 (default) or analytic in the reward; analytic (default), ratio_k3, k2 or k3 in the loss."""

    kl_target: Positive | None = None
    """Adapt the weight, from beta on, so that the KL of a completion comes to so many nats."""

    kl_horizon: Positive = 10000.0
    """Completions in which the adapted weight can change by a fifth."""

    clip_low: Annotated[float, Ge(0), Lt(1)] | None = 0.2
    """How far below 1 a ratio still counts; null: however far."""

    clip_high: NonNegative | None = 0.2
    """How far above 1; more than clip_low (DAPO: 0.28) lets rare tokens rise."""

    clip_dual: Annotated[float, Gt(1)] | None = None
    """Where the advantage is negative no ratio counts as more than this; null: as it is."""

    ratio: Literal["token", "sequence", "sequence_mean"] = "token"
    """What is compared with the policy that sampled: each token, the whole completion, or its geometric mean (GSPO)."""

    mean: Literal["tokens", "sequences", "sequence_sums", "constant"] = "tokens"
    """Mean over all tokens; over completions, each with the mean or the sum of its tokens; or sums by a constant (Dr. GRPO)."""

    constant: Positive | None = None
    """What `mean: constant` divides the sum of a completion's tokens by, such as the largest number of them."""

    correction: Literal[
        "token_truncate",
        "token_mask",
        "sequence_truncate",
        "sequence_mask",
        "sequence_mean_mask",
        "geometric_filter",
        "none",
    ] = "token_truncate"
    """How tokens are weighted whose log-prob was another in the engine that sampled them."""

    correction_bounds: tuple[NonNegative, NonNegative] | None = None
    """Lower and upper bound of these weights; null: the usual ones of the correction."""

    dynamic_sampling: bool = False
    """Leave out prompts whose completions all have the same score. None is sampled in their place."""

    mask_truncated: bool = False
    """Do not learn from completions that did not come to their end; they are still compared with."""

    missing_end_penalty: NonNegative = 0.0
    """What such a completion loses of its score."""

    entropy_bonus: NonNegative = 0.0
    """Weight c of the policy's entropy at each token."""

    entropy_drop: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of the vocabulary, its least likely items, that the rewarded entropy leaves out (AEnt: 0.2 to 0.3)."""

    entropy_range: tuple[NonNegative, NonNegative] | None = None
    """Adapt the weight c so that the rewarded entropy stays within these bounds (AEnt: 0.05 and 0.23)."""

    entropy_rate: Positive = 1e-3
    """What the weight changes by per nat beyond them; it stays between 1e-5 and 3e-3."""

    token_weights: Literal["none", "steer", "clip_cov", "kl_cov"] = "none"
    """Tokens that count less so that entropy does not collapse; kl_cov takes the place of the clip."""

    steer_least: OpenUnit = 0.8
    """The least weight of a token under steer."""

    cov_share: OpenUnit | None = None
    """Share of the tokens that clip_cov leaves out (null: 0.0002) or kl_cov holds (null: 0.002)."""

    cov_bounds: tuple[float, float] = (1.0, 5.0)
    """Covariances between which clip_cov draws."""

    cov_weight: Positive = 1.0
    """Weight of |log policy - log old policy| where kl_cov holds."""

    quantile: OpenUnit = 0.4
    """Which quantile of a group's scores qae compares with."""

    gamma: Probability = 1.0
    """Discount of later rewards."""

    lam: Probability = 0.95
    """How far ahead gae trusts rewards more than its critic."""

    value_weight: NonNegative = 0.1
    """Weight v of the critic's loss, which also trains the body of the policy."""

    value_clip: Positive | None = 0.2
    """How far a value may move from that of the round before its loss is that of the bound; null: however far."""

    value_learning_rate: NonNegative | None = None
    """Learning rate of the critic's head; null: that of the run."""

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            owner, possible = _BELONGS.get(one.name, ("", []))
            if owner and vars(self)[one.name] != one.default and vars(self)[owner] not in possible:
                raise ValueError(f"{one.name} is for {owner} = {' or '.join(possible)} and would be ignored; leave it out")
        clip = (self.clip_low, self.clip_high, self.clip_dual) != (0.2, 0.2, None)
        bonus = self.entropy_bonus or self.entropy_range
        if self.kl == "loss" and self.kl_estimate == "k1":
            raise ValueError(f"kl_estimate: {REFUSED_IN_LOSS}; possible: analytic, ratio_k3, k2, k3, or kl = reward")
        if self.kl == "reward" and self.kl_estimate not in (None, "k1", "analytic"):
            raise ValueError(f"kl_estimate: {self.kl_estimate} in the reward has not the KL's gradient; possible: k1, analytic")
        if self.mean == "constant" and self.constant is None:
            raise ValueError("mean = constant needs `constant`, such as sampling.max_new_tokens")
        if clip and self.token_weights == "kl_cov":
            raise ValueError("clip_low, clip_high, clip_dual: token_weights = kl_cov takes their place and would ignore them")
        if self.entropy_drop and (self.kl == "none" or not bonus):
            raise ValueError("entropy_drop needs an entropy_bonus to be of, and a reference, which kl = none has not")
        if self.kl_target is None and self.kl_horizon != 10000.0:
            raise ValueError("kl_horizon says how fast the weight comes to kl_target, which is not given")

    @property
    def estimate(self) -> str:
        """What stands for the KL."""
        return self.kl_estimate or {"reward": "k1", "loss": "analytic", "none": ""}[self.kl]

    @property
    def rewarded_entropy(self) -> str:
        """The statistic whose mean the bonus is of."""
        return "kept_entropy" if self.entropy_drop else "entropy"


def _want(config: RLHFConfig) -> list[Want]:
    found: list[Want] = ["entropy"]
    if config.estimate == "analytic":
        found.append("reverse_kl")
    if config.entropy_drop:
        found.append(Rowwise(name="kept_entropy", f=lambda lp, lq, tokens: kept_entropy(lp, config.entropy_drop)))
    return found


def _state(config: RLHFConfig, context: Mapping[str, float], means: Mapping[str, float]) -> dict[str, float]:
    found = {}
    if config.kl_target is not None:
        found["kl_weight"] = context.get("kl_weight", config.beta)
        if "kl_of_round" in means:
            goal = {"target": config.kl_target, "horizon": config.kl_horizon}
            found["kl_weight"] = adapted(found["kl_weight"], means["kl_of_round"], **goal, episodes=means["episodes"])
    if config.entropy_range is not None:
        found["entropy_weight"] = context.get("entropy_weight", config.entropy_bonus)
        if "entropy_of_step" in means:
            low, high = config.entropy_range
            options = {"low": low, "high": high, "rate": config.entropy_rate, "box": (1e-5, 3e-3)}
            found["entropy_weight"] = entropy_weight(found["entropy_weight"], means["entropy_of_step"], **options)
    return found


def _watch(config: RLHFConfig, metrics: Mapping[str, float]) -> list[str]:
    said = []
    if metrics.get("groups/alike", 0.0) > 0.9:
        said.append("rlhf: nearly all groups have completions of equal scores, and nothing is learned from those")
    if metrics.get("mismatch/left_out", 0.0) > 0.1:
        said.append("rlhf: the correction leaves out more than a tenth of the tokens (mismatch/left_out)")
    return said


def _critic_start(config: RLHFConfig, sizes: Sizes) -> dict[str, torch.Tensor]:
    return {"value": torch.zeros(sizes.hidden + 1)} if config.advantage == "gae" else {}


def _critic(config: RLHFConfig, own: Mapping[str, torch.Tensor], one: Completions) -> dict[str, torch.Tensor]:
    weight, bias = own["value"][:-1], own["value"][-1]
    return {"values": one["hidden"].to(weight.dtype) @ weight + bias}  # [N]


def _lesson(config: RLHFConfig, seen: Experience) -> Lesson:
    one, group = dataclasses.replace(seen.completion, logps=wide(seen.old_logps)), seen.group
    if config.advantage in GROUPED and group < 2:
        raise UserError(
            f"rollouts.group_size = {group}: advantage = {config.advantage} compares completions of one prompt; 2 or more"
        )
    scores = wide(seen.scores) - config.missing_end_penalty * ~seen.finished  # [B]
    rows = estimators.grouped(scores, group)
    alike = rows.amax(1) == rows.amin(1) if len(rows) else rows.new_zeros(0).bool()  # [B / G]
    keep = ~(config.mask_truncated & ~seen.finished) & ~(config.dynamic_sampling & alike.repeat_interleave(group))
    tokens, critic = _advantages(config, seen, one, scores, one.spread(keep))
    weights, penalties, found = _token_weights(config, seen, one, tokens)
    kl = one.logratio if one.reference_logps is not None else None
    metrics = {
        "groups/alike": alike.to(scores.dtype),
        "advantages": tokens,
        "advantages/std": tokens,
        **found,
        **({} if kl is None else {"kl/weight": _weight("kl_weight", config.beta, seen.context, scores)}),
    }
    remember = {}
    if config.kl_target is not None:
        remember = {"kl_of_round": kl, "episodes": seen.total(scores.new_tensor([float(len(scores))]))}
    columns = {"advantages": tokens, "old_logps": one.logps, "weights": weights, "penalties": penalties, **critic}
    return Lesson(keep=keep, tokens=columns, metrics=metrics, remember=remember)


def _weight(name: str, otherwise: float, context: Mapping[str, torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """A weight as its controller has it; without one as it was set."""
    return torch.as_tensor(context.get(name, otherwise), dtype=like.dtype, device=like.device)


def _advantages(
    config: RLHFConfig, seen: Experience, one: Completions, scores: torch.Tensor, kept: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """[N] the advantages, and the columns of the critic; `kept` [N] bool, the tokens that are learned from."""
    nothing = torch.zeros_like(one.logps)
    critic, costs = {"old_values": nothing, "returns": nothing}, nothing
    if config.kl == "reward":
        costs = wide(seen.more["reverse_kl"]) if config.estimate == "analytic" else one.logratios
        costs = _weight("kl_weight", config.beta, seen.context, costs) * costs  # [N]
    if config.advantage in GROUPED:
        found = one.spread(GROUPED[config.advantage](config, scores - one.sum(costs), seen.group, one.lengths))
        return (_white(found, kept, seen) if config.advantage == "reinforce_pp_baseline" else found), critic
    there = one.lengths > 0
    rewards = (-costs).index_add(0, (one.lengths.cumsum(0) - 1)[there], scores.to(costs.dtype)[there])
    if config.advantage == "reinforce_pp":
        return _white(estimators.returns_to_go(rewards, one.lengths, config.gamma), kept, seen), critic
    values = wide(seen.more["values"])
    found, returns = estimators.gae(rewards, values, one.lengths, config.gamma, config.lam)
    return _white(found, kept, seen), {"old_values": values, "returns": returns}


def _white(advantages: torch.Tensor, kept: torch.Tensor, seen: Experience) -> torch.Tensor:
    return estimators.whitened(advantages, kept, seen.total)


def _token_weights(
    config: RLHFConfig, seen: Experience, one: Completions, advantages: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """[N] what each token counts, [N] weights of its distance from where it was, and metrics."""
    weights, penalties, metrics = torch.ones_like(one.logps), torch.zeros_like(one.logps), {}
    if seen.engine_logps is not None:
        metrics = mismatch(one, seen.engine_logps)
        if config.correction != "none":
            bounds = config.correction_bounds or BOUNDS[config.correction]
            weights = correction(one, seen.engine_logps, config.correction, bounds)
            metrics |= {"mismatch/corrected": weights, "mismatch/left_out": (weights == 0).to(weights.dtype)}
    if config.token_weights == "steer":
        change = entropy_change(advantages, one.logps, one.logps, wide(seen.more["entropy"]))
        counted = steer(change, config.steer_least, seen.total)
        weights, metrics = weights * counted, {**metrics, "steer": counted}
    elif config.token_weights != "none":
        cov, share = covariance(advantages, one.logps, seen.total), config.cov_share or _COV_SHARE[config.token_weights]
        metrics |= {"covariance": cov, "covariance/max": cov}
        if config.token_weights == "kl_cov":
            penalties = config.cov_weight * kl_cov(cov, share, seen.total).to(weights.dtype)
        else:
            weights = weights.masked_fill(clip_cov(cov, share, *config.cov_bounds, seen.total), 0)
    return weights, penalties, metrics


@objective(
    reference=lambda config: config.kl != "none",
    want=_want,
    state=_state,
    learned=Learned(start=_critic_start, statistics=_critic, learning_rate=lambda config: config.value_learning_rate),
    watch=_watch,
    lesson=_lesson,
)
def rlhf(config: RLHFConfig, sampled: Sampled) -> Loss:
    one = dataclasses.replace(sampled.completion, logps=wide(sampled.completion.logps))
    old, advantages = wide(sampled.old_logps), wide(sampled.advantages)
    r = ratio(one, old, config.ratio)  # [N]
    held = config.token_weights == "kl_cov"
    bounds = (None, None, None) if held else (config.clip_low, config.clip_high, config.clip_dual)
    values, clipped = surrogate(r, advantages, *bounds)
    values = wide(sampled.weights) * values
    away = one.logps - old
    metrics = {"ratio": r.detach(), "ratio/max": r.detach(), "ratio/ess": r.detach(), **clipped}
    metrics |= {"kl/old": power(away.detach(), minus_one=True) - away.detach(), "entropy": one["entropy"].detach()}
    remember = {}
    if held:
        values = values + wide(sampled.penalties) * away.abs()
    if config.kl == "loss" or config.estimate == "analytic":
        analytic = config.estimate == "analytic"
        k = wide(one["reverse_kl"]) if analytic else in_loss(config.estimate, one.logratios, power(away))
        values = values + _weight("kl_weight", config.beta, sampled.context, k) * k
        metrics[f"kl/{config.estimate}"] = k.detach()
    if config.entropy_bonus or config.entropy_range:
        entropy = one[config.rewarded_entropy]
        c = _weight("entropy_weight", config.entropy_bonus, sampled.context, values)
        values = values - c * wide(entropy)
        metrics |= {"entropy/rewarded": entropy.detach(), "entropy/weight": c}
        remember = {"entropy_of_step": entropy.detach()}
    if config.advantage == "gae":
        critic = _value_loss(config, sampled)
        values = values + config.value_weight * critic
        metrics |= {"values": one["values"].detach(), "values/loss": critic.detach(), "values/returns": sampled.returns}
    if config.mean == "tokens":
        return Loss(values, metrics, "completion", remember=remember)
    of_rows = one.mean(values) if config.mean == "sequences" else one.sum(values) / (config.constant or 1.0)  # [B]
    return Loss(of_rows, metrics, remember=remember)


def _value_loss(config: RLHFConfig, sampled: Sampled) -> torch.Tensor:
    """[N] half the squared error of the critic, or that of its clipped value where it is larger."""
    values, old, returns = (wide(v) for v in (sampled.completion["values"], sampled.old_values, sampled.returns))
    error = (values - returns).square()
    if config.value_clip is not None:
        near = old + (values - old).clamp(-config.value_clip, config.value_clip)
        error = torch.maximum(error, (near - returns).square())
    return error / 2
