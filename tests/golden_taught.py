"""Golden files of distillation.

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
from rows import by_definition

from posttrain.registry import Objective
from posttrain.stats import Completions, Loss, Taught, Want

_FOLDER = Path(__file__).parent / "goldens"


def taught(
    student: torch.Tensor,
    teacher: torch.Tensor,
    targets: torch.Tensor,
    want: Sequence[Want] = (),
    lengths: Sequence[int] | None = None,
) -> Taught:
    """Statistics of distillation from [N, V] logits of both models: one completion, or some of `lengths`."""
    more = by_definition(student, teacher.detach(), targets, ["logp", "ref_logp", *want])
    return Taught(
        completion=Completions(
            logps=more.pop("logp"),
            lengths=torch.tensor([len(targets)] if lengths is None else list(lengths)),
            reference_logps=more.pop("ref_logp"),
            more=more,
        )
    )


@dataclass(frozen=True)
class TaughtGolden:
    """One golden file of distillation."""

    inputs: dict[str, Any]
    outputs: dict[str, Any]
    student: torch.Tensor
    """[B, T, V] float64 leaf that requires its gradient."""

    params: dict[str, Any]
    """The settings with which its source ran."""

    official: dict[str, Any]
    """What the authors' code gives in its own precision, where it ran."""

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

    def agree(self, objective: Objective, config: Any, *, atol: float = 1e-9) -> Loss:
        """Run the objective and assert its losses, their mean and the gradient of the mean, to `atol`."""
        loss = objective(config, self.taught(objective.want(config)))
        assert loss.plus is None
        if "per_token" in self.outputs:
            assert loss.per == "completion"
            close(loss.values, tensor(self.outputs["per_token"])[self.mask].tolist(), atol)
        close(loss.values.mean(), self.outputs["loss"], atol)
        (gradient,) = torch.autograd.grad(loss.values.mean(), self.student)
        close(gradient, self.outputs["grad_student_logits"], atol)
        return loss


def taught_golden(name: str) -> TaughtGolden:
    """The golden file `name`."""
    content = json.loads((_FOLDER / f"{name}.json").read_text())
    student = tensor(content["inputs"]["student_logits"]).requires_grad_()
    return TaughtGolden(content["inputs"], content["outputs"], student, content["params"], content["official_check"])
