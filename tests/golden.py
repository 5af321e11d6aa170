"""Golden files: inputs and what the authors' own code makes of them (or, where there is none, an independent float64 formula).

Each file says where its numbers come from in `source`. Most hold [2B, S, V] logits, the B chosen sequences first; position t
predicts token t + 1; label -100 is prompt or padding. The files in goldens/ are never edited.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rows import by_definition

from posttrain.registry import Objective
from posttrain.stats import Completions, Labelled, Loss, Pairs, Want

_FOLDER = Path(__file__).parent / "goldens"


def tensor(values: Any) -> torch.Tensor:
    """Nested numbers of a golden file -> float64."""
    return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class Golden:
    """One golden file."""

    inputs: dict[str, Any]
    outputs: dict[str, Any]
    policy_logits: torch.Tensor | None
    """[2B, S, V] float64 leaf that requires its gradient; None in a file of sequence log-probs only."""

    @property
    def mask(self) -> torch.Tensor:
        """[2B, S - 1] bool: the positions that predict a completion token."""
        return torch.tensor(self.inputs["labels"])[:, 1:] != -100

    @property
    def targets(self) -> torch.Tensor:
        """[2B, S - 1] int64: the token each position predicts; anything where the mask is False."""
        return torch.tensor(self.inputs["labels"])[:, 1:].clamp(min=0)

    def pairs(self, want: Sequence[Want] = ()) -> Pairs:
        """The statistics of the file, float64; differentiable to `policy_logits`."""
        if self.policy_logits is None:
            return Pairs(**{role: self._sequences(role) for role in ("chosen", "rejected")})
        sides = (self.policy_logits, tensor(self.inputs["ref_logits"]), torch.tensor(self.inputs["labels"]))
        half = len(self.policy_logits) // 2
        chosen, rejected = (_completions(*(side[part] for side in sides), want) for part in (slice(half), slice(half, None)))
        return Pairs(chosen=chosen, rejected=rejected)

    def labelled(self, want: Sequence[Want] = ()) -> Labelled:
        """The statistics of a file of labelled sequences, [B, S, V] logits each, with its mismatched ones."""
        files = self.inputs
        mismatched = tensor(files["KL_policy_logits"]), tensor(files["KL_ref_logits"]), torch.tensor(files["KL_labels"])
        return Labelled(
            completion=_completions(self.policy_logits, tensor(files["ref_logits"]), torch.tensor(files["labels"]), want),
            label=tensor(files["is_desirable"]),
            mismatched=_completions(*mismatched),
        )

    def _sequences(self, role: str) -> Completions:
        logps = tensor(self.inputs[f"policy_{role}_logps"])
        reference_logps = tensor(self.inputs[f"reference_{role}_logps"])
        return Completions(logps=logps, lengths=torch.ones(len(logps), dtype=torch.int64), reference_logps=reference_logps)

    def agree(
        self,
        objective: Objective,
        config: Any,
        *,
        atol: float = 1e-9,
        outputs: dict[str, Any] | None = None,
        statistics: Any = None,
    ) -> Loss:
        """Run the objective and assert its losses, their mean and, where the file has them, the gradients of the mean.

        Args:
            atol: absolute tolerance of each number.
            outputs: the entry of `self.outputs` that holds them, where it is not `self.outputs` itself.
            statistics: what the objective reads, where it is not the file's `pairs()`.
        """
        outputs = self.outputs if outputs is None else outputs
        loss = objective(config, self.pairs(objective.want(config)) if statistics is None else statistics)
        assert loss.per == "row" and loss.plus is None
        close(loss.values, outputs["per_example_losses"], atol)
        close(loss.values.mean(), outputs["loss"], atol)
        if "grad_policy_logits" in outputs:
            (gradient,) = torch.autograd.grad(loss.values.mean(), self.policy_logits)
            close(gradient, outputs["grad_policy_logits"], atol)
        return loss


def _completions(policy: torch.Tensor, reference: torch.Tensor, labels: torch.Tensor, want: Sequence[Want] = ()) -> Completions:
    """Statistics of B sequences from [B, S, V] logits and [B, S] labels."""
    mask = labels[:, 1:] != -100
    rows = policy[:, :-1][mask], reference[:, :-1][mask], labels[:, 1:][mask]  # [N, V], [N, V], [N]
    more = by_definition(*rows, ["logp", "ref_logp", *want])
    logps, reference_logps = more.pop("logp"), more.pop("ref_logp")
    return Completions(logps=logps, lengths=mask.sum(1), reference_logps=reference_logps, more=more)


def close(got: torch.Tensor, expected: Any, atol: float = 1e-9) -> None:
    """Assert equality to `atol`, no relative part."""
    torch.testing.assert_close(got.detach().double(), tensor(expected), rtol=0, atol=atol)


def golden(name: str) -> Golden:
    """The golden file `name`."""
    content = json.loads((_FOLDER / f"{name}.json").read_text())
    inputs = content["inputs"]
    logits = tensor(inputs["policy_logits"]).requires_grad_() if "policy_logits" in inputs else None
    return Golden(inputs, content["outputs"], logits)
