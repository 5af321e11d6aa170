"""BD-KD: forward and reverse KL, the one of the more uncertain side weighted up.

    loss = w_t KL(p || q) + w_s KL(q || p),   p teacher, q student
    w_t = delta where H(p) > H(q) else 1,   w_s = delta where H(q) > H(p) else 1

The weights have no gradient. The mean is over tokens.

Source: Amara et al. 2022, "BD-KD: Balancing the Divergences for Online Knowledge Distillation", arXiv:2212.12965. There the
teacher is trained, too, by the reverse KL; here it is not, as in the form that ABKD compares with (Wang et al. 2025,
arXiv:2505.04560, authors' code). That form has no teacher entropy in the forward term, so its value is larger by w_t H(p) at
equal gradient: `released`.
Value at policy == reference: 0; with a cross-entropy term, or as released, it depends on the data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...registry import objective
from ...schema import NonNegative, Positive
from ...stats import Loss, Sum, Taught, wide


@dataclass(frozen=True, kw_only=True)
class BDKDConfig:
    """Settings of BD-KD."""

    delta: Positive = 3.0
    """Weight of the KL of the side whose entropy is the larger; the other has 1."""

    released: bool = False
    """Leave the teacher's entropy out of the forward KL, as released; only the value changes."""

    ce_weight: NonNegative = 0.0
    """Weight of the cross-entropy of the data's tokens."""


_WANT = (
    "forward_kl",
    "reverse_kl",
    Sum(name="student_entropy", summand=lambda student, _: -student.exp() * student),
    Sum(name="teacher_entropy", summand=lambda _, teacher: -teacher.exp() * teacher, slope=lambda s, _: torch.zeros_like(s)),
)


def _start(config: BDKDConfig) -> float | None:
    return None if config.released or config.ce_weight else 0.0


@objective(reference=True, want=_WANT, start=_start)
def bdkd(config: BDKDConfig, rows: Taught) -> Loss:
    one = rows.completion
    student, teacher = (wide(one[f"{side}_entropy"]).detach() for side in ("student", "teacher"))  # [N]
    forward_weight = torch.where(teacher > student, config.delta, 1.0)  # [N]
    reverse_weight = torch.where(student > teacher, config.delta, 1.0)  # [N]
    forward, reverse = wide(one["forward_kl"]), wide(one["reverse_kl"])  # [N]
    losses = forward_weight * forward + reverse_weight * reverse  # [N]
    if config.released:
        losses = losses + forward_weight * teacher
    metrics = {
        "forward_kl": forward.detach(),
        "reverse_kl": reverse.detach(),
        "entropy/student": student,
        "entropy/teacher": teacher,
        "forward_share": (teacher > student).float(),
    }
    return Loss(losses - config.ce_weight * wide(one.logps), metrics, per="completion")
