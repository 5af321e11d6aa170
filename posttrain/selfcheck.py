"""The check at step 0: the numbers that training will use are compared with their definitions, on the first rows of the data.

1. Log-probs of the layout and the chunked kernel, against the model's own logits on each sequence alone.
2. The loss where the policy is the reference, against the value that the objective states, and policy against reference.
A mismatch stops the run with both numbers, except that `layout: auto` falls back to separate sequences and says so.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from .models import Request, causal_lm, evaluating, model_inputs
from .schema import UserError
from .stats import Completions
from .trees import TreeCollator, shareable

if TYPE_CHECKING:
    from .trainer import Trainer

_ROWS = 8
"""One of so many first rows is compared: enough to see a wrong number, at the price of a few small forwards."""

log = logging.getLogger("posttrain")


class SelfCheck(TrainerCallback):
    """Runs when training begins, on every process alike (so that sharded models can gather)."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.report: dict[str, str] = {}
        """What was compared, for the header and the card."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare; raise UserError with the numbers on a mismatch."""
        trainer = self.trainer
        rows = trainer.first_rows(_ROWS)
        with trainer.compute_loss_context_manager():
            scores = trainer.objective.scores
            layout, error = choose_layout(trainer.model, rows, trainer.roles, trainer.layout, trainer.impl, scores=scores)
            for teacher in trainer.reference.models if trainer.objective.reads_teacher else ():
                retold = trainer.data_collator.retold
                theirs = rows if retold is None else [retold.row(row) for row in rows]
                layout, beside = choose_layout(teacher, theirs, trainer.roles, _at_most(layout, trainer.layout), trainer.impl)
                error = max(error, beside)
            separate = torch.tensor([float(layout == "separate")], device=args.device)
            if trainer.accelerator.reduce(separate, "sum").item():  # rows are dealt by it, which all have to do alike
                layout = "separate"
            trainer.data_collator.layout = layout
            found = {"scores": f"within {error:.1e} of the model's own"} if scores else {}
            self.report = {"layout": layout, **(found or {"log-probs": f"within {error:.1e} nats of the model's own logits"})}
            if state.global_step == 0 and trainer.reads_reference:
                with torch.no_grad(), evaluating(trainer.model):
                    self._start(sorted(rows, key=lambda row: _length(row, trainer.roles))[:2])
        log.info("self-check passed: %s", ", ".join(f"{name} {value}" for name, value in self.report.items()))

    @property
    def _other(self) -> str:
        return "teacher" if self.trainer.objective.reads_teacher else "reference"

    def _start(self, rows: list[dict[str, Any]]) -> None:
        """Loss and log-ratios where the policy is the reference."""
        trainer = self.trainer
        batch = trainer.data_collator(rows)
        batch = trainer.referred({name: tensor.to(trainer.args.device) for name, tensor in batch.items()})
        statistics = trainer.statistics(trainer.model, batch | trainer.scalars([batch]))
        online = trainer.objective.online  # nothing was sampled yet that a loss could be of
        if online and not trainer.starts_at_reference:
            return
        value = 0.0 if online else trainer.objective(trainer.config, statistics).values.mean().item()
        if not trainer.starts_at_reference:
            self.report["start"] = f"loss {value:.4f}, the {self._other} being another model"
            return
        roles = {name: vars(statistics)[name] for name in trainer.roles}
        apart = max(one.logratios.abs().max().item() for one in roles.values())
        allowed = tolerance(trainer.model)
        if apart > allowed:
            raise UserError(
                f"self-check: the policy is not trained yet, but its log-probs differ from the {self._other}'s by {apart:.3g} "
                f"nats (allowed {allowed:.3g}); the {self._other} is {trainer.reference.description}"
            )
        if online:
            self.report["start"] = f"log-probs within {apart:.1e} nats of the {self._other}'s"
            return
        equal = _at_reference(statistics)
        if trainer.objective.before is not None:
            early = _at_reference(trainer.statistics(trainer.model, batch, early=True))
            means = {name: values.mean() for name, values in trainer.objective.before(trainer.config, early).items()}
            equal = dataclasses.replace(equal, context={**equal.context, **means})
        stated, got = trainer.objective.start(trainer.config), trainer.objective(trainer.config, equal).values.mean().item()
        if stated is not None and abs(got - stated) > 1e-4 * max(1.0, abs(stated)):
            raise UserError(f"self-check: {trainer.objective.name} starts at {got:.6f}, but it states {stated:.6f}")
        self.report["start"] = f"loss {value:.6f}" + ("" if stated is None else f" (stated {stated:.6f})")


def _at_most(layout: str, setting: str) -> str:
    """The setting of the layout for a second model, the first one being laid out so."""
    return setting if layout == "tree" else "separate"


def _at_reference(statistics: Any) -> Any:
    """The statistics as they are where the policy equals the reference."""
    completions = {name: one for name, one in vars(statistics).items() if isinstance(one, Completions)}
    return dataclasses.replace(statistics, **{name: one.at_reference() for name, one in completions.items()})


def choose_layout(
    model: nn.Module,
    rows: Sequence[dict[str, Any]],
    roles: Sequence[str],
    setting: str = "auto",
    impl: str = "auto",
    *,
    scores: bool = False,
) -> tuple[str, float]:
    """The layout to use, and by how many nats its log-probs differ from the model's own logits, or its scores from its own.

    Args:
        model: the policy, on its device, statistics attached.
        rows: some rows of data; one is compared, a short one.
        setting: `auto`, `tree` or `separate`.
        scores: the model scores completions.

    Raises:
        UserError: `tree` was asked for and is not exact; or the log-probs or scores are wrong in every layout.
    """
    own, ours, what = (_own_scores, _our_scores, "scores") if scores else (_own_logps, _our_logps, "log-probs")
    row = _telling(model, rows, roles)
    reason, allowed = shareable(model), tolerance(model)
    with torch.no_grad(), evaluating(model):
        truth = own(model, row, roles)
        errors = {}
        for layout in ("tree", "separate"):
            if layout == "tree" and (setting == "separate" or reason):
                continue
            errors[layout] = (ours(model, row, roles, layout, impl) - truth).abs().max().item()
            if errors[layout] <= allowed:
                break
    if "tree" in errors and errors["tree"] > allowed:
        reason = f"sharing a prompt gives {what} {errors['tree']:.3g} off (allowed {allowed:.3g})"
    if setting == "tree" and reason:
        raise UserError(f"layout: tree is not exact for this model because {reason}; use auto or separate")
    layout, error = list(errors.items())[-1]
    if error > allowed:
        raise UserError(
            f"self-check: {what} differ from the model's own by {error:.3g} (allowed {allowed:.3g}): "
            f"the output head of {type(causal_lm(model)).__name__} is not understood"
        )
    if setting == "auto" and layout == "separate":
        log.warning("layout: separate sequences, because %s", reason)
    return layout, error


def _telling(model: nn.Module, rows: Sequence[dict[str, Any]], roles: Sequence[str]) -> dict[str, Any]:
    """The shortest row; for a sliding window the shortest that is longer than it, else the longest."""
    window = causal_lm(model).config.get_text_config().to_dict().get("sliding_window") or 0
    ordered = sorted(rows, key=lambda row: _length(row, roles))
    return next((row for row in ordered if _length(row, roles) > window), ordered[-1])


def _length(row: dict[str, Any], roles: Sequence[str]) -> int:
    """Tokens of a row's prompt and its shortest completion."""
    return len(row["prompt"]) + min(len(completion) for role in roles for completion in row[role])


def tolerance(model: nn.Module) -> float:
    """Nats by which two ways of computing a log-prob may differ: what rounding hidden states in the compute dtype makes."""
    parameter = next(model.parameters())
    low = torch.is_autocast_enabled(parameter.device.type) or parameter.dtype not in (torch.float32, torch.float64)
    return 0.5 if low else 2e-3


def _our_logps(model: nn.Module, row: dict[str, Any], roles: Sequence[str], layout: str, impl: str) -> Tensor:
    """[N] log-probs of a row's completions as training computes them."""
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in TreeCollator(roles=roles, layout=layout)([row]).items()}
    request = Request(gather=batch["gather"], targets=batch["targets"], want=("logp",), impl=impl)
    return model(**model_inputs(model, batch, layout), statistics=request)["logp"].float()


def _own_logps(model: nn.Module, row: dict[str, Any], roles: Sequence[str]) -> Tensor:
    """[N] the same from the model's own logits, one plain sequence at a time."""
    device = next(model.parameters()).device
    out = []
    for completion in (c for role in roles for c in row[role]):
        ids = torch.tensor([[*row["prompt"], *completion]], device=device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(row["prompt"]) - 1 : -1].float()  # [T, V]
        out.append(logits.log_softmax(-1).gather(1, ids[0, len(row["prompt"]) :, None])[:, 0])
    return torch.cat(out)


def _our_scores(model: nn.Module, row: dict[str, Any], roles: Sequence[str], layout: str, impl: str) -> Tensor:
    """[B, 1 + H] scores of a row's completions as training computes them, and the directions of the states they are read from
    (a new output is 0 and says nothing of these)."""
    device = next(model.parameters()).device
    collator = TreeCollator(roles=roles, layout=layout, whole=True)
    batch = {name: tensor.to(device) for name, tensor in collator([row]).items()}
    inputs = model_inputs(model, batch, layout)
    request = Request(gather=batch["gather"], targets=batch["targets"], want=("score",), impl=impl)
    hidden = model(**inputs, statistics=dataclasses.replace(request, want=()))["hidden"]
    return _beside(model(**inputs, statistics=request)["score"], hidden)


def _own_scores(model: nn.Module, row: dict[str, Any], roles: Sequence[str]) -> Tensor:
    """[B, 1 + H] the same from the model's own output, one plain sequence at a time."""
    device = next(model.parameters()).device
    out = []
    for completion in (c for role in roles for c in row[role]):
        ids = torch.tensor([[*row["prompt"], *completion]], device=device)
        said = model(input_ids=ids, use_cache=False, output_hidden_states=True)
        out.append(_beside(said.logits[:, 0], said.hidden_states[-1][:, -1]))
    return torch.cat(out)


def _beside(scores: Tensor, hidden: Tensor) -> Tensor:
    return torch.cat([scores.float()[:, None], nn.functional.normalize(hidden.float(), dim=-1)], dim=1)
