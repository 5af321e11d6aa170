"""DAC-KL: a KL within the dense part of the teacher's distribution, between two quantiles that a small network places.

    loss = ce_weight CE + KL(p~ || q~) + span_weight S,   p~ = m p / sum m p,  q~ = m q / sum m q,   p teacher, q student
    m_v = sigmoid((C_v - u) / s) sigmoid((l - C_v) / s),   1 for the teacher's likeliest item, 0 beyond its k likeliest
    C_v = probability of the items above v and half of its own,   u = u_max sigmoid(o_0),  l = l_min + (1 - l_min) sigmoid(o_1)
    o = W_2 relu(W_1 x + b_1) + b_2,   x = teacher's and student's probabilities of the k items, without gradient

    S = sum_v (p_t,v p_t+1,v - q_t,v q_t+1,v)^2 for two adjacent tokens (`span: adjacent`)

The mean is over tokens. W and b are the objective's own parameters: trained beside the student, kept in checkpoints, not
exported.

Source: Liu et al. 2024, "Multi-Granularity Semantic Revision for Large Language Model Distillation", arXiv:2407.10068, eq. 6
to 8 and 10, as reviews quote them: there is no code of the authors, and they leave open what the network reads, whether its
quantiles are of values or of mass, whether the student is renormalised, and what keeps the window open. This reading:
quantiles of mass, soft masks, both sides renormalised over the window, so that the KL is one and never negative. Trained to
make the loss smaller (`dac_objective: min`, the paper's), the network closes its window as far as it may, which u <= u_max
<= l_min <= l bounds; trained against it (`reverse`) it opens it. So the bounds are logged, as `window/upper` and
`window/lower`, and a window that stays where `bounds` puts it is there to compare with (`window: fixed`).

Their spans come from a chunker, which is left out here: a span is a completion, so every two adjacent tokens of it count. S
is a product of two probabilities, squared, and by far the smallest term. The first token of a completion has none and counts
as 0 in the mean. The method's third part, correcting a rollout, is corrections.py.
Value at policy == reference: 0 without cross-entropy; with it (the default) it depends on the data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from ...registry import objective
from ...schema import NonNegative, OpenUnit, Positive, PositiveInt, Probability
from ...stats import Completions, Learned, Loss, Sizes, Spans, Taught, Top, Want, wide


@dataclass(frozen=True, kw_only=True)
class DACKLConfig:
    """Settings of DAC-KL."""

    k: PositiveInt = 64
    """Items that take part: the teacher's likeliest."""

    temperature: Positive = 1.0
    """Divides the logits of both models."""

    softness: Positive = 0.05
    """s, the width of the window's two edges, as a share of probability."""

    window: Literal["learned", "fixed"] = "learned"
    """Whether a network places the window for each token, or it stays where `bounds` puts it."""

    bounds: tuple[Probability, Probability] = (0.05, 0.95)
    """u and l: of a fixed window, or about where a learned one starts."""

    u_max: OpenUnit = 0.5
    """Largest u of a learned window: probability that can be cut off above it, but for the likeliest item."""

    l_min: OpenUnit = 0.5
    """Smallest l of a learned window."""

    dac_objective: Literal["min", "reverse"] = "min"
    """Whether the network makes the loss smaller or, by the reversed gradient, larger."""

    hidden: PositiveInt = 128
    """Width of the network."""

    window_learning_rate: Positive | None = None
    """Learning rate of the network; the run's when absent."""

    ce_weight: NonNegative = 1.0
    """Weight of the cross-entropy of the data's tokens."""

    span: Literal["none", "adjacent"] = "none"
    """Whether adjacent tokens are compared, too."""

    span_weight: NonNegative = 1.0
    """Weight of that comparison."""

    def __post_init__(self) -> None:
        if self.u_max > self.l_min:
            raise ValueError(f"u_max = {self.u_max} is above l_min = {self.l_min}; the window would have nothing it must keep")
        upper, lower = self.bounds
        if self.window == "learned" and not (0 < upper < self.u_max and self.l_min < lower < 1):
            raise ValueError(f"bounds = [{upper}, {lower}]: a learned window starts within (0, u_max) and (l_min, 1)")
        if upper > lower:
            raise ValueError(f"bounds = [{upper}, {lower}]: the window would end before it begins")


def _parameters(config: DACKLConfig, sizes: Sizes) -> dict[str, torch.Tensor]:
    """What the network starts from: about `bounds` whatever it reads."""
    if config.window == "fixed":
        return {}
    inputs, hidden = 2 * config.k, config.hidden
    shares = torch.tensor([config.bounds[0] / config.u_max, (config.bounds[1] - config.l_min) / (1 - config.l_min)])
    return {
        "w1": torch.randn(hidden, inputs) / math.sqrt(inputs),
        "b1": torch.zeros(hidden),
        "w2": torch.randn(2, hidden) / math.sqrt(hidden),
        "b2": shares.logit(),
    }


def _window(config: DACKLConfig, parameters: Mapping[str, torch.Tensor], one: Completions) -> dict[str, torch.Tensor]:
    """`window` [N, 2]: u and l of each token."""
    pad = (0, config.k - one["top_logps"].shape[1])  # where the vocabulary is smaller than k
    sides = one["top_reference_logps"], one["top_logps"].detach()
    x = torch.cat([torch.nn.functional.pad(wide(logps).exp(), pad) for logps in sides], -1)  # [N, 2k]
    x = x.to(parameters["w1"].dtype)
    hidden = torch.relu(x @ parameters["w1"].mT + parameters["b1"])  # [N, hidden]
    o = torch.sigmoid(hidden @ parameters["w2"].mT + parameters["b2"])  # [N, 2]
    return {"window": torch.stack([config.u_max * o[:, 0], config.l_min + (1 - config.l_min) * o[:, 1]], -1)}


def _want(config: DACKLConfig) -> tuple[Want, ...]:
    top = Top(k=config.k, temperature=config.temperature)
    return (top,) if config.span == "none" else (top, Spans(temperature=config.temperature))


def log_gates(teacher: torch.Tensor, window: torch.Tensor, softness: float) -> torch.Tensor:
    """[N, k] descending log-probs of the teacher, [N, 2] windows -> [N, k] log m."""
    p = teacher.exp()
    middle = p.cumsum(-1) - p / 2  # C
    inside = torch.nn.functional.logsigmoid((middle - window[:, :1]) / softness)
    inside = inside + torch.nn.functional.logsigmoid((window[:, 1:] - middle) / softness)
    return torch.cat([torch.zeros_like(inside[:, :1]), inside[:, 1:]], -1)


def _start(config: DACKLConfig) -> float | None:
    return 0.0 if config.ce_weight == 0 else None


@objective(
    reference=True,
    want=_want,
    start=_start,
    learned=Learned(start=_parameters, statistics=_window, learning_rate=lambda config: config.window_learning_rate),
)
def dackl(config: DACKLConfig, rows: Taught) -> Loss:
    one = rows.completion
    teacher, student = wide(one["top_reference_logps"]), wide(one["top_logps"])  # [N, k]
    window = teacher.new_tensor([config.bounds]) if config.window == "fixed" else wide(one["window"])  # [N or 1, 2]
    if config.dac_objective == "reverse":
        window = 2 * window.detach() - window
    gates = log_gates(teacher, window, config.softness)  # [N, k]
    p, q = (teacher + gates).log_softmax(-1), (student + gates).log_softmax(-1)  # [N, k]
    divergence = (p.exp() * (p - q)).sum(-1)  # [N]
    m = gates.detach().exp()
    metrics = {
        "dac_kl": divergence.detach(),
        "window/upper": window[:, 0].detach(),
        "window/lower": window[:, 1].detach(),
        "kept/teacher": (m * teacher.exp()).sum(-1),
        "kept/student": (m * student.detach().exp()).sum(-1),
        "window/entropy": (torch.special.entr(m) + torch.special.entr(1 - m)).sum(-1),
    }
    losses = divergence - config.ce_weight * wide(one.logps)  # [N]
    if config.span == "adjacent":
        spans = torch.where(one.position > 0, wide(one["span_cost"]), 0)  # [N]
        losses, metrics["span"] = losses + config.span_weight * spans, spans.detach()
    return Loss(losses, metrics, per="completion")
