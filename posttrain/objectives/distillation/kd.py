"""Knowledge distillation: a divergence between student and teacher at every completion token.

    loss_t = D(student || teacher) at t - ce_weight * log student(y_t),   mean over all completion tokens

D is any divergence of divergences.py; the student is its policy, the teacher its reference, so that forward_kl is
KL(teacher || student), the usual choice, and reverse_kl KL(student || teacher). jsd:<b> is GKD's, skew_kl:0.1 and
skew_reverse_kl:0.1 are DistiLLM's (with `mean: sequences` and skew_reverse_kl_detached DistiLLM-2's terms), total_variation is
TVD. Values include the teacher's entropy, which some codes leave out; gradients are the same. The cross-entropy is added
beside D, which keeps weight 1 (codes with (1 - a) CE + a D: ce_weight = (1 - a) / a, the learning rate times a).

A temperature divides the logits of both models in D alone. The gradient then shrinks about as 1 / temperature^2, which
`temperature_squared` undoes (Hinton et al.); the codes of GKD, DistiLLM and ABKD leave the factor out, as the default does.

With `top`, D is between the k items that the teacher finds likeliest, by the full softmax of both, and what `tail` says of
the rest: `bucket` makes it one more item, which gives a lower bound of D whose gradient moves all of the vocabulary;
`truncated` leaves it out, so that the sum is no divergence, may be negative, and with reverse_kl rewards a student for leaving
the k items; `teacher_renormalised` scales the teacher to sum 1 over them, `both_renormalised` the student, too, which
then feels no pull from the rest.

Source: Hinton et al. 2015, arXiv:1503.02531; jsd: Agarwal et al. 2024, arXiv:2306.13649; skewed: Ko et al. 2024,
arXiv:2402.03898.
Value at policy == reference: 0; with ce_weight, or a teacher that is cut (`truncated`, `teacher_renormalised`), it depends on
the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ...divergences import DivergenceName, divergence
from ...registry import objective
from ...schema import NonNegative, Positive, PositiveInt
from ...stats import Completions, Loss, Sum, Taught, Top, Want


@dataclass(frozen=True, kw_only=True)
class KDConfig:
    """Settings of knowledge distillation."""

    divergence: DivergenceName = "forward_kl"
    """Divergence of the student (policy) from the teacher (reference): forward_kl, reverse_kl, jsd:<b>, skew_kl:<a>, ..."""

    temperature: Positive = 1.0
    """Divides the logits of both models in the divergence."""

    temperature_squared: bool = False
    """Multiply the divergence by temperature^2."""

    ce_weight: NonNegative = 0.0
    """Weight of the cross-entropy on the completion's tokens, added to the divergence."""

    top: PositiveInt | None = None
    """Compare only so many items, the teacher's likeliest; null compares the whole vocabulary."""

    tail: Literal["bucket", "truncated", "teacher_renormalised", "both_renormalised"] = "bucket"
    """What becomes of the other items where `top` is given."""

    mean: Literal["tokens", "sequences"] = "tokens"
    """Mean over all tokens, or over the completions, each with the mean over its tokens."""

    def __post_init__(self) -> None:
        if self.top is None and self.tail != "bucket":
            raise ValueError(f"tail = {self.tail!r} says what becomes of the items beyond top, which is not given")


def _want(config: KDConfig) -> tuple[Want, ...]:
    if config.top is not None:
        return (Top(k=config.top, temperature=config.temperature),)
    entry = divergence(config.divergence)
    return (
        Sum(
            name=config.divergence,
            summand=entry.summand,
            slope=entry.slope,
            divergence=config.divergence,
            temperature=config.temperature,
            eager=config.mean == "tokens",
        ),
    )


def _start(config: KDConfig) -> float | None:
    exact = config.top is None or config.tail in ("bucket", "both_renormalised")
    return 0.0 if exact and not config.ce_weight else None


@objective(reference=True, want=_want, start=_start)
def kd(config: KDConfig, taught: Taught) -> Loss:
    one = taught.completion
    metrics = {}
    if config.top is None:
        values = one[config.divergence]  # [N]
    else:
        values = _sparse(config, one)
        metrics = {f"top_mass/{who}": mass for who, mass in _masses(one).items()}
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    metrics[f"divergence/{config.divergence}"] = values.detach()
    if config.temperature_squared:
        values = config.temperature**2 * values
    if config.ce_weight:
        values = values - config.ce_weight * one.logps
    metrics |= {"nll/student": -one.logps.detach()}
    if one.reference_logps is not None:
        metrics["nll/teacher"] = -one.reference_logps
    return Loss(values, metrics, "completion") if config.mean == "tokens" else Loss(one.mean(values), metrics)


def _sparse(config: KDConfig, one: Completions) -> torch.Tensor:
    """[N] the divergence over the teacher's likeliest items."""
    wide = torch.promote_types(one["top_logps"].dtype, torch.float32)
    lp, lq = one["top_logps"].to(wide), one["top_reference_logps"].to(wide)  # [N, k]
    if config.tail == "bucket":
        lp, lq = _with_rest(lp), _with_rest(lq)  # [N, k + 1]
    if config.tail in ("teacher_renormalised", "both_renormalised"):
        lq = lq.log_softmax(-1)
    if config.tail == "both_renormalised":
        lp = lp.log_softmax(-1)
    return divergence(config.divergence).summand(lp, lq).sum(-1)


def _with_rest(logps: torch.Tensor) -> torch.Tensor:
    """[N, k] log-probs -> [N, k + 1], the last one of all other items together.

    1 - sum of the k has only the digits that their rounding leaves: it is not taken for less than 8 units of rounding, its
    gradient then being that at the bound, which is finite.
    """
    whole = logps.logsumexp(-1, keepdim=True)
    bound = -8 * torch.finfo(whole.dtype).eps
    whole = whole + (whole.clamp(max=bound) - whole).detach()
    return torch.cat([logps, (-torch.expm1(whole)).log()], dim=-1)


def _masses(one: Completions) -> dict[str, torch.Tensor]:
    """[N] each: the probability that student and teacher put on the items compared."""
    logps = {"student": one["top_logps"].detach(), "teacher": one["top_reference_logps"]}
    return {who: values.float().logsumexp(-1).exp() for who, values in logps.items()}
