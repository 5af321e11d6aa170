"""f-DPG: policy optimisation towards the optimum of RLHF with KL, under any f-divergence.

    p(y | x) = reference(y | x) exp(r(x, y) / beta) / Z(x),   minimise D_f(policy || p) = E_p f(t),   t = policy(y) / p(y)

    loss = policy / q (f'(t) - B) log policy(y),   policy / q and f'(t) - B without gradient

of each completion y of q, the engine as it was when the round was sampled. The gradient is that of D_f: reverse_kl is RLHF
with the KL in the reward, forward_kl is DPG, which moves probability to all that p allows, js lies between them. f-DPO, whose
divergences these are (divergences.py), asks for the policy whose f'(policy / reference) is the reward, which depends on f; here
p is the optimum whatever f is, and f decides the way there and what a policy that cannot reach p comes to.

Z(x) is the mean of p Z / q over the G completions of the prompt, so that -f' of forward_kl is at most G where q is the policy;
B is the mean of f' over its other completions. The authors' code keeps moving averages of both over its run; a prompt's own Z
takes many completions, of which it has 1024.

Source: Go et al. 2023, "Aligning Language Models with Preferences through f-divergence Minimization", arXiv:2302.08215,
theorem 1; Z for each prompt: Korbak et al. 2022, arXiv:2112.00791.
Value at policy == reference: it depends on the data.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ...advantages import grouped, rloo
from ...divergences import DivergenceName, divergence
from ...experience import Experience, Lesson
from ...importance import power
from ...registry import objective
from ...schema import Positive, UserError
from ...stats import Completions, Loss, wide


@dataclass(frozen=True, kw_only=True)
class FDPGConfig:
    """Settings of f-DPG."""

    beta: Positive = 0.1
    """Temperature of the target; larger keeps it nearer to the reference."""

    divergence: DivergenceName = "js"
    """Between the policy and the target."""

    def __post_init__(self) -> None:
        if self.divergence.startswith("skew_reverse_kl_detached"):
            raise ValueError("divergence: its gradient is not that of an f-divergence; skew_reverse_kl has the same value")


@dataclass(frozen=True, kw_only=True)
class Targeted:
    """B completions that the policy wrote, and the log-probs of their target: the family of f-DPG."""

    completion: Completions
    """The completions."""

    engine_logps: torch.Tensor = field(metadata={"per": "token"})
    """[N] log q, what the completions were sampled with."""

    target_logps: torch.Tensor = field(metadata={"per": "token"})
    """[N] log p(y) of a completion, in equal parts at its tokens."""

    baselines: torch.Tensor = field(metadata={"per": "token"})
    """[N] B, at all tokens of a completion."""

    context: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """As in `Pairs`."""


def _lesson(config: FDPGConfig, seen: Experience) -> Lesson:
    if seen.group < 2:
        raise UserError(f"rollouts.group_size = {seen.group}: Z is a mean over completions of one prompt; 2 or more")
    one = dataclasses.replace(seen.completion, logps=wide(seen.old_logps))
    q = one.logps if seen.engine_logps is None else wide(seen.engine_logps)  # [N]
    unnormalised = one.reference_logp + wide(seen.scores) / config.beta  # [B] log p Z
    log_z = grouped(unnormalised - one.sum(q), seen.group).logsumexp(1) - math.log(seen.group)  # [B / G]
    target = unnormalised - log_z.repeat_interleave(seen.group)  # [B]
    slopes = divergence(config.divergence).derivative(one.logp - target)  # [B]
    tokens = {
        "engine_logps": q,
        "target_logps": one.spread(target / one.lengths.clamp(min=1)),
        "baselines": one.spread(slopes - rloo(slopes, seen.group)),
    }
    metrics = {"target/log_z": log_z, "target/kl": one.logp - target, "target/ess": (target - one.sum(q)).exp()}
    return Lesson(keep=torch.ones_like(seen.finished), tokens=tokens, metrics=metrics)


@objective(reference=True, lesson=_lesson)
def fdpg(config: FDPGConfig, sampled: Targeted) -> Loss:
    one = dataclasses.replace(sampled.completion, logps=wide(sampled.completion.logps))
    f, h = divergence(config.divergence), (one.logp - one.sum(sampled.target_logps)).detach()  # [B] log t
    weights = power(one.logp.detach() - one.sum(sampled.engine_logps))  # [B]
    slopes = f.derivative(h)  # [B]
    metrics = {"rewards": -slopes, "weights/ess": weights, "weights/max": weights, "divergence/continued": f.continued(h)}
    return Loss(weights * (slopes - one.mean(sampled.baselines)) * one.logp, metrics)
