"""Direct Coverage Optimization (DCO): learns that one of N samples is the completion, so that a likely one is left alone.

    loss = -log(1 - (1 - p)^N),   p = exp(sum_t log policy(y_t | prompt, y_<t))

The gradient is that of -log p times F = N (1 - p)^(N-1) p / (1 - (1 - p)^N), which falls from 1 to 0 about p = 1 / N: the
policy does not grow surer of a completion than N samples need. N = 1 is supervised fine-tuning on the sum over tokens. p is
that of the whole completion: as long as it is far below 1 / N, as it mostly is of long ones, this is supervised fine-tuning,
F = 1, and the loss less by log N. Logged are F (`dco/factor`) and 1 - (1 - p)^N (`dco/coverage`), whose mean over held-out
rows is the expected pass@N where an answer is right only as it stands in the data.

Below log p = -60, before p underflows, the loss goes on linearly, which it is there to all digits; so it does above p = 1,
where rounding may lead.

Source: Chen et al. 2025, "Rethinking Fine-Tuning when Scaling Test-Time Compute: Limiting Confidence Improves Mathematical
Reasoning", arXiv:2502.07154. The authors' code minimises F, held constant, times the completion's NLL, by default as a mean
over its tokens: `released`. The sum has the gradient of the loss, but not its value; the mean is that gradient over the
number of tokens. Its F is a series cut after three terms where p N < 0.1, which is off by up to 1.3e-4; here it is exact.
Value at policy == reference: depends on the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le

from ...registry import objective
from ...stats import Answers, Loss

_RARE, _SURE = -60.0, -1e-30
"""The log p beyond which the loss goes on linearly: below the first F is 1 to 1e-17, above the second what it is at p = 1, to
1e-29."""


@dataclass(frozen=True, kw_only=True)
class DCOConfig:
    """Settings of DCO."""

    samples: Annotated[int, Ge(1), Le(10**9)] = 256
    """N, of which one is to be right: as many as will be sampled of the trained policy; 1 is supervised fine-tuning."""

    released: Literal["mean", "sum"] | None = None
    """The loss of the authors' code, F as a constant times the completion's NLL: the mean over its tokens, their default, or
    the sum; null is the loss above."""


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - e^x) of x < 0 in the one of two forms that keeps its digits, neither taken where its slope is infinite."""
    near, far = x.clamp(min=-math.log(2)), x.clamp(max=-math.log(2))
    return torch.where(x > -math.log(2), (-near.expm1()).log(), (-far.exp()).log1p())


def coverage_loss(logp: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[B] log p -> [B] -log(1 - (1 - p)^n) and [B] F, minus its derivative, detached."""
    inside = logp.clamp(_RARE, _SURE)
    miss = _log1mexp(inside)  # log(1 - p)
    factor = (n * (inside + (n - 1) * miss).exp() / -(n * miss).expm1()).detach()
    return -_log1mexp(n * miss) - factor * (logp - inside), factor


@objective(reference=False)
def dco(config: DCOConfig, answers: Answers) -> Loss:
    one = answers.completion
    losses, factor = coverage_loss(one.logp, config.samples)  # [B]
    metrics = {"dco/factor": factor, "dco/coverage": (-losses).exp().detach()}
    if config.released is not None:
        losses = -factor * (one.mean(one.logps) if config.released == "mean" else one.logp)
    return Loss(losses, metrics)
