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

from posttrain.registry import Objective
from posttrain.stats import Completions, Labelled, Loss, Pairs

_STATISTICS = {
    "entropy": lambda lp, lq: -(lp.exp() * lp).sum(-1),
    "forward_kl": lambda lp, lq: (lq.exp() * (lq - lp)).sum(-1),
    "log_sum_p2": lambda lp, lq: (2 * lp).logsumexp(-1),
    "max_logp": lambda lp, lq: lp.max(-1).values,
}
"""Statistics over the vocabulary from the log-softmax of both models, [..., V] -> [...]."""

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

    def logps(self, logits: torch.Tensor) -> torch.Tensor:
        """[2B, S, V] -> [2B, S - 1] log-prob of the next token."""
        return logits[:, :-1].log_softmax(-1).gather(-1, self.targets[..., None]).squeeze(-1)

    def pairs(self, want: Sequence[str] = ()) -> Pairs:
        """The statistics of the file, float64; differentiable to `policy_logits`. `want`: names of `_STATISTICS`."""
        if self.policy_logits is None:
            return Pairs(**{role: self._sequences(role) for role in ("chosen", "rejected")})
        policy, reference = self.logps(self.policy_logits), self.logps(tensor(self.inputs["ref_logits"]))  # [2B, S - 1]
        rows = self.policy_logits[:, :-1].log_softmax(-1), tensor(self.inputs["ref_logits"])[:, :-1].log_softmax(-1)
        more = {name: _STATISTICS[name](*rows) for name in want}  # [2B, S - 1] each
        half = len(policy) // 2
        return Pairs(
            **{
                role: Completions(
                    logps=policy[part][self.mask[part]],
                    lengths=self.mask[part].sum(1),
                    reference_logps=reference[part][self.mask[part]],
                    more={name: values[part][self.mask[part]] for name, values in more.items()},
                )
                for role, part in (("chosen", slice(0, half)), ("rejected", slice(half, None)))
            }
        )

    def labelled(self) -> Labelled:
        """The statistics of a file of labelled sequences, [B, S, V] logits each, with its mismatched ones."""
        return Labelled(
            completion=self._side(self.policy_logits, self.inputs["ref_logits"], self.inputs["labels"]),
            label=tensor(self.inputs["is_desirable"]),
            mismatched=self._side(
                tensor(self.inputs["KL_policy_logits"]), self.inputs["KL_ref_logits"], self.inputs["KL_labels"]
            ),
        )

    @staticmethod
    def _side(policy: torch.Tensor, reference: Any, labels: Any) -> Completions:
        targets = torch.tensor(labels)[:, 1:]
        mask = targets != -100

        def logps(logits: torch.Tensor) -> torch.Tensor:
            return logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)[mask]

        return Completions(logps=logps(policy), lengths=mask.sum(1), reference_logps=logps(tensor(reference)))

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


def close(got: torch.Tensor, expected: Any, atol: float = 1e-9) -> None:
    """Assert equality to `atol`, no relative part."""
    torch.testing.assert_close(got.detach().double(), tensor(expected), rtol=0, atol=atol)


def golden(name: str) -> Golden:
    """The golden file `name`."""
    content = json.loads((_FOLDER / f"{name}.json").read_text())
    inputs = content["inputs"]
    logits = tensor(inputs["policy_logits"]).requires_grad_() if "policy_logits" in inputs else None
    return Golden(inputs, content["outputs"], logits)
