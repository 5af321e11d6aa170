"""Golden files of distillation, and the statistics of distillation by their definitions.

A file holds [B, T, V] logits of student and teacher; position t of both predicts `labels[t]` (no shift), `mask` says which
positions count. `per_token` and the gradient of the mean over the counted positions are what its source makes of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from golden import close, tensor

from posttrain.divergences import divergence
from posttrain.registry import Objective
from posttrain.stats import Completions, Loss, Rowwise, Sum, Taught, Top, Want

_FOLDER = Path(__file__).parent / "goldens"

_OF_STUDENT = {
    "entropy": lambda lp: -(lp.exp() * lp).sum(-1),
    "log_sum_p2": lambda lp: (2 * lp).logsumexp(-1),
    "max_logp": lambda lp: lp.max(-1).values,
    "argmax": lambda lp: lp.argmax(-1),
}
"""Statistics of one model by name, [N, V] log-probs -> [N]."""


def dense(student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, want: Sequence[Want]) -> dict[str, torch.Tensor]:
    """The wanted statistics from [N, V] logits, by definition and differentiable by autograd."""
    out: dict[str, torch.Tensor] = {}
    for entry in want:
        heat = 1.0 if isinstance(entry, str) else entry.temperature
        lp, lq = (student / heat).log_softmax(-1), (teacher / heat).log_softmax(-1)
        match entry:
            case Sum():
                out[entry.name] = entry.summand(lp, lq).sum(-1)
            case Rowwise():
                out[entry.name] = entry.f(lp, lq, targets)
            case Top():
                logps, ids = lq.topk(min(entry.k, lq.shape[-1]), dim=-1)
                out |= {"top_ids": ids, "top_reference_logps": logps, "top_logps": lp.gather(-1, ids)}
            case _ if entry in _OF_STUDENT:
                out[entry] = _OF_STUDENT[entry](lp)
            case _:
                out[entry] = divergence(entry).summand(lp, lq).sum(-1)
    return out


def taught(
    student: torch.Tensor,
    teacher: torch.Tensor,
    targets: torch.Tensor,
    want: Sequence[Want] = (),
    lengths: Sequence[int] | None = None,
) -> Taught:
    """Statistics of distillation from [N, V] logits of both models: one completion, or some of `lengths`."""
    pick = lambda logits: logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)  # noqa: E731
    return Taught(
        completion=Completions(
            logps=pick(student),
            lengths=torch.tensor([len(targets)] if lengths is None else list(lengths)),
            reference_logps=pick(teacher).detach(),
            more=dense(student, teacher.detach(), targets, want),
        )
    )


@dataclass(frozen=True)
class TaughtGolden:
    """One golden file of distillation."""

    inputs: dict[str, Any]
    outputs: dict[str, Any]
    student: torch.Tensor
    """[B, T, V] float64 leaf that requires its gradient."""

    @property
    def mask(self) -> torch.Tensor:
        """[B, T] bool: the positions that count."""
        return tensor(self.inputs["mask"]) > 0

    @property
    def teacher(self) -> torch.Tensor:
        """[B, T, V] float64."""
        return tensor(self.inputs["teacher_logits"])

    def taught(self, want: Sequence[Want] = ()) -> Taught:
        """The statistics of the counted positions, differentiable to `student`."""
        mask = self.mask
        targets = torch.tensor(self.inputs["labels"])[mask]
        return taught(self.student[mask], self.teacher[mask], targets, want, mask.sum(1).tolist())

    def agree(self, objective: Objective, config: Any, *, atol: float = 1e-9, per_token: bool = True) -> Loss:
        """Run the objective and assert the loss of every token, their mean and its gradient.

        Args:
            atol: absolute tolerance of each number.
            per_token: the file's `per_token` holds what the objective gives at a token; where it is False only the mean counts.
        """
        loss = objective(config, self.taught(objective.want(config)))
        assert loss.per == "completion" and loss.plus is None
        if per_token:
            close(loss.values, tensor(self.outputs["per_token"])[self.mask].tolist(), atol)
        close(loss.values.mean(), self.outputs["loss"], atol)
        (gradient,) = torch.autograd.grad(loss.values.mean(), self.student)
        close(gradient, self.outputs["grad_student_logits"], atol)
        return loss


def taught_golden(name: str) -> TaughtGolden:
    """The golden file `name`."""
    content = json.loads((_FOLDER / f"{name}.json").read_text())
    student = tensor(content["inputs"]["student_logits"]).requires_grad_()
    return TaughtGolden(content["inputs"], content["outputs"], student)
