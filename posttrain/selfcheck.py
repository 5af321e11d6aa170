"""The check at step 0: the numbers that training will use are compared with their definitions, on the first rows of the data.

1. Log-probs of the layout and the chunked kernel, against the model's own logits on each sequence alone.
2. The loss where the policy is the reference, against the value that the objective states, and the rewards against 0.
A mismatch stops the run with both numbers, except that `layout: auto` falls back to separate sequences and says so.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from .models import Request, causal_lm, model_inputs
from .schema import UserError
from .trees import shareable

if TYPE_CHECKING:
    from .trainer import Trainer

_ROWS = 8
"""The shortest of so many first rows is compared: enough to see a wrong number, at the price of a few small forwards."""

log = logging.getLogger("posttrain")


class SelfCheck(TrainerCallback):
    """Runs when training begins, on every process alike (so that sharded models can gather)."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.report: dict[str, Any] = {}
        """What was compared, for the header and the card."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare; raise UserError with the numbers on a mismatch."""
        trainer = self.trainer
        rows = list(itertools.islice(iter(trainer.train_dataset), _ROWS))
        row = min(rows, key=lambda one: len(one["prompt"]) + sum(len(c) for role in trainer.roles for c in one[role]))
        with torch.no_grad(), quiet(trainer.model), trainer.compute_loss_context_manager():
            self._layout(row)
            if state.global_step == 0 and trainer.objective.reference:
                self._start(rows[:2])
        log.info("self-check passed: %s", ", ".join(f"{name} {value}" for name, value in self.report.items()))

    def _layout(self, row: dict[str, Any]) -> None:
        trainer = self.trainer
        reason = shareable(trainer.model)
        if trainer.layout == "tree" and reason:
            raise UserError(f"layout: tree is not exact for this model because {reason}; use auto or separate")
        layout = trainer.layout if trainer.layout != "auto" else ("separate" if reason else "tree")
        truth = self._truth(row)
        tolerance = _tolerance(truth)
        error = (self._ours(row, layout) - truth).abs().max().item()
        if error > tolerance and layout == "tree":
            apart = (self._ours(row, "separate") - truth).abs().max().item()
            if apart <= tolerance and trainer.layout == "tree":
                raise UserError(f"layout: tree gives log-probs {error:.3g} nats off the model's own; use auto or separate")
            if apart <= tolerance:
                reason, layout, error = f"shared prompts give log-probs {error:.3g} nats off", "separate", apart
        if error > tolerance:
            raise UserError(
                f"self-check: log-probs differ from the model's own logits by {error:.3g} nats (allowed {tolerance:.3g}); "
                f"the output head of {type(causal_lm(trainer.model)).__name__} is not understood"
            )
        if layout == "separate" and trainer.layout == "auto":
            log.warning("layout: separate sequences, because %s", reason)
        trainer.data_collator = trainer.collator(layout)
        self.report |= {"layout": layout, "log-probs within": f"{error:.1e} nats of the model's own"}

    def _ours(self, row: dict[str, Any], layout: str) -> Tensor:
        """[N] log-probs of a row's completions as training computes them."""
        trainer = self.trainer
        batch = self._batch([row], layout)
        request = Request(gather=batch["gather"], targets=batch["targets"], want=("logp",), impl=trainer.impl)
        model = trainer.accelerator.unwrap_model(trainer.model)
        return model(**model_inputs(model, batch, layout), statistics=request)["logp"].float()

    def _truth(self, row: dict[str, Any]) -> Tensor:
        """[N] the same from the model's own logits, one plain sequence at a time."""
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        out = []
        for completion in (c for role in trainer.roles for c in row[role]):
            ids = torch.tensor([[*row["prompt"], *completion]], device=trainer.args.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, len(row["prompt"]) - 1 : -1].float()  # [T, V]
            out.append(logits.log_softmax(-1).gather(1, ids[0, len(row["prompt"]) :, None])[:, 0])
        return torch.cat(out)

    def _batch(self, rows: list[dict[str, Any]], layout: str) -> dict[str, Tensor]:
        return {name: tensor.to(self.trainer.args.device) for name, tensor in self.trainer.collator(layout)(rows).items()}

    def _start(self, rows: list[dict[str, Any]]) -> None:
        """Loss and reference where the policy is the reference."""
        trainer = self.trainer
        layout = trainer.data_collator.layout
        statistics = trainer.statistics(trainer.model, self._batch(rows, layout), layout=layout)
        value = trainer.objective(trainer.config, statistics).values.mean().item()
        roles = [vars(statistics)[role] for role in trainer.roles]
        apart = max(one.logratios.abs().max().item() for one in roles)
        if not trainer.starts_at_reference:
            self.report["start"] = f"loss {value:.4f} (the reference is another model)"
            return
        tolerance = _tolerance(torch.cat([one.logps for one in roles]))
        if apart > tolerance:
            raise UserError(
                f"self-check: the policy has not been trained, yet its log-probs differ from the reference's by {apart:.3g} nats "
                f"(allowed {tolerance:.3g}); the reference is {trainer.reference.description}"
            )
        at_reference = type(statistics)(**{**vars(statistics), **{n: vars(statistics)[n].at_reference() for n in trainer.roles}})
        expected = trainer.objective.start(trainer.config)
        got = trainer.objective(trainer.config, at_reference).values.mean().item()
        if expected is not None and abs(got - expected) > 1e-4 * max(1.0, abs(expected)):
            raise UserError(f"self-check: {trainer.objective.name} starts at {got:.6f}, it states {expected:.6f}")
        self.report["start"] = f"loss {value:.6f}" + ("" if expected is None else f" (stated {expected:.6f})")


def _tolerance(logps: Tensor) -> float:
    """Nats by which two ways of computing log-probs may differ: the rounding of hidden states in the compute dtype."""
    low = torch.is_autocast_enabled(logps.device.type)
    return 0.5 if low else 2e-3


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while (dropout off)."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)
