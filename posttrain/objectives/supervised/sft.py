"""Supervised fine-tuning: the cross-entropy of the completions' tokens, end token included; nothing of the prompt is learned.

    loss = -log policy(y_t | prompt, y_<t), mean over all completion tokens of a step

`nll: rows` takes the mean over completions, each by the mean of its own tokens, so that long ones count no more than short
ones. On the best of n completions that a policy samples itself (`posttrain iterate`) this is best-of-n distillation, or
rejection sampling fine-tuning.

Source: Ouyang et al. 2022, "Training language models to follow instructions with human feedback", arXiv:2203.02155; on one's
own best: Touvron et al. 2023, arXiv:2307.09288, section 3.2.3.
Value at policy == reference: depends on the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...registry import objective
from ...stats import Answers, Loss, wide


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Settings of supervised fine-tuning."""

    nll: Literal["tokens", "rows"] = "tokens"
    """What the loss is a mean over: all tokens of a step, or completions, each by the mean of its own tokens."""


@objective(reference=False)
def sft(config: SFTConfig, answers: Answers) -> Loss:
    one = answers.completion
    if config.nll == "rows":
        return Loss(-one.mean(one.logps))  # [B]
    return Loss(-wide(one.logps), per="completion")  # [N]
