"""The trainer: transformers' own, with statistics in place of logits and one global reduction.

Only public members of `transformers.Trainer` are overridden. The loss of an optimizer step is the mean over all its rows (or
tokens), over accumulation steps and processes alike: `get_batch_samples` sees every micro-batch of the step first and counts.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from . import context, learned
from .balance import ByLength, tokens_of
from .experience import token_columns_of
from .faults import NonFinite, Policy
from .foreign import Foreign, Retold
from .inside import refuse_unknown
from .loading import by_position, loader
from .meter import Meter
from .mismatch import early_roles
from .models import Request, by_reference, causal_lm, evaluating, model_inputs
from .moving import Follows, MovingModel
from .reference import AdapterOff, CachedLogps, FrozenModel, Teachers, reads_vocabulary
from .registry import Objective
from .schema import UserError
from .scores import Scores
from .selfcheck import SelfCheck
from .stats import Completions, Inside, Loss, Want, bound, columns_of, roles_of
from .teacher_cache import CachedTeacher
from .trees import Collator, TreeCollator, attention_scale, row_multiple
from .vocabulary import DROPPED

log = logging.getLogger("posttrain")


class Trainer(transformers.Trainer):
    """`transformers.Trainer` on trees: statistics -> objective -> one global mean.

    Args:
        objective, config: the method and its settings.
        model: a causal LM with statistics attached (models.load_policy), or a model that scores (scoring.load_scorer).
        reference: where reference log-probs come from, or who teaches; None for an objective that reads neither.
        layout: `tree`, `separate`, or `auto` (tree where the first rows give the same log-probs both ways).
        starts_at_reference: whether policy and reference are equal before training, which is then checked.
        impl: implementation of the kernel (`auto`, `dense`, `chunked`, `fused`).
        retell: makes the collator of a teacher that has another tokenizer from the student's.
        nonfinite: what to do about a loss or gradient that is not finite; faults.py.
        temperature: of the policy and the reference: both logits are divided by it.
        kwargs: those of `transformers.Trainer`.

    Raises:
        UserError: several GPUs are visible to one process, which would replicate the model in threads; or steps are to be
            skipped under DeepSpeed.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *,
        objective: Objective,
        config: Any,
        model: nn.Module,
        args: TrainingArguments,
        reference: FrozenModel | AdapterOff | CachedLogps | Teachers | Foreign | CachedTeacher | None = None,
        layout: str = "auto",
        starts_at_reference: bool = True,
        impl: str = "auto",
        retell: Callable[[TreeCollator], Retold] | None = None,
        nonfinite: Policy = "stop",
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> None:
        self.temperature = temperature
        self.objective, self.config, self.reference, self.impl = objective, config, reference, impl
        self.roles, self.columns = roles_of(objective.family), columns_of(objective.family)
        self.tokens = token_columns_of(objective.family)
        self.early_roles = [*early_roles(objective), *objective.before_reads]
        want = objective.want(config)
        self.inside = tuple(entry for entry in want if isinstance(entry, Inside))
        self.want = ("score",) if objective.scores else ("logp", *(entry for entry in want if entry not in self.inside))
        self.reads_reference = objective.reads_reference(config)
        self.needs_reference_head = objective.reads_teacher or reads_vocabulary(objective, config)
        assert not (self.needs_reference_head and isinstance(reference, CachedLogps)), "references.kind_of refuses this"
        if args.n_gpu > 1:
            raise UserError(
                "launch: several GPUs are visible to one process; start one per GPU: --launch ddp, or set one visible"
            )
        if self.inside:
            refuse_unknown(reference.body(model), self.inside)
        self.layout, self.starts_at_reference, self.retell = layout, starts_at_reference, retell
        self.model_config = causal_lm(model).config
        theirs = self.model_config if reference is None else reference.body(model).config
        self.own = learned.add(model, objective, config, theirs, args.seed)
        self.meter, self.eval_meter = Meter(), Meter()
        self._eval_scalars: dict[str, Tensor] = {}
        self._warned: set[str] = set()
        super().__init__(model=model, args=args, data_collator=self.collator(), **kwargs)
        after = None if objective.state is None else partial(objective.state, config)
        self.context = context.Context(self.accelerator, after)
        self.add_callback(self.context)
        if nonfinite == "skip" and self.is_deepspeed_enabled:
            raise UserError("nonfinite = 'skip': DeepSpeed steps before anyone can look at the gradient; possible: stop, go_on")
        self.nonfinite = NonFinite(self, nonfinite)
        self.add_callback(self.nonfinite)
        if self.own is not None:
            self._keep(self.own)
        if reference is not None:
            reference.prepare(self.accelerator)
        if isinstance(reference, MovingModel):
            self.add_callback(Follows(self, reference))
        self.add_callback(SelfCheck(self))

    def _keep(self, own: learned.Own) -> None:
        """See that the objective's own parameters are optimised as they say, and saved."""
        if not self.is_deepspeed_enabled:
            self.add_callback(learned.Kept(own))
        elif "optimizer" in self.accelerator.state.deepspeed_plugin.deepspeed_config:
            raise UserError(
                "train.deepspeed: leave `optimizer` out of its configuration, as it would ignore the learning rate and weight "
                f"decay of {self.objective.name}'s own parameters; train.optim names one"
            )

    def collator(self) -> Collator:
        """Rows -> batch. For `layout: auto` the self-check sets its layout before the first batch is made."""
        layout = "tree" if self.layout == "auto" else self.layout
        lookup = self.reference.lookup if isinstance(self.reference, CachedLogps | CachedTeacher) else None
        rows = {"attention_scale": attention_scale(self.model_config), "multiple": row_multiple(self.model_config)}
        whole = self.objective.scores
        main = TreeCollator(self.roles, self.columns, layout, self.tokens, lookup, whole=whole, **rows)
        early = dataclasses.replace(main, roles=self.early_roles) if self.early_roles else None
        retold = None if self.retell is None else self.retell(dataclasses.replace(main, columns=()))
        live = isinstance(self.reference, FrozenModel | AdapterOff) and not self.needs_reference_head
        both = dataclasses.replace(main, roles=[*self.roles, *self.early_roles]) if early and live else None
        return Collator(main, early, retold, both)

    def statistics(self, model: nn.Module, batch: dict[str, Tensor], *, early: bool = False) -> Any:
        """The family's statistics of a batch, with gradient to `model` (the policy, wrapped or not).

        `early`: of the completions that the objective's `before` reads.
        """
        scalars, roles = context.read(batch), self.roles
        if early and self.early_roles:
            batch, roles = Collator.part(batch, "early"), self.early_roles
        request, answer = self._read(model, batch, roles, tuple(bound(self.want, scalars)))
        columns = {name: batch[f"row.{name}"] for name in self.columns}
        columns |= {name: batch[f"token.{name}"] for name in self.tokens}
        first, *others = [
            self.objective.family(
                **{**dict.fromkeys(self.roles), **self._completions(roles, batch, said), **columns}, context=scalars
            )
            for said in by_reference(answer, len(request.refs))
        ]
        return dataclasses.replace(first, others=others) if others else first

    def _read(
        self, model: nn.Module, batch: dict[str, Tensor], roles: Sequence[str], want: tuple[Want, ...]
    ) -> tuple[Request, dict[str, Tensor]]:
        """What was asked of the model about the tokens of a batch, and what it and the reference say."""
        inputs = model_inputs(self.model, batch, self.data_collator.layout)
        request = self._referring(self._request(batch, want), self.model, batch)
        if self.own is not None:
            request = dataclasses.replace(request, lengths=torch.cat([batch[f"lengths.{role}"] for role in roles]))
        return request, {**request.given, **model(**inputs, statistics=request)}

    def _request(self, part: dict[str, Tensor], want: tuple[Want, ...]) -> Request:
        return Request(gather=part["gather"], targets=part["targets"], want=want, impl=self.impl, temperature=self.temperature)

    def referred(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A micro-batch; where early completions are read, with what a live reference says of those and the trained ones."""
        both = Collator.part(batch, "both")
        if not both:
            return batch
        with self.compute_loss_context_manager():
            logps = self._referring(self._request(both, ()), self.model, both).given["ref_logp"]
        own, early = logps.split([len(batch["targets"]), len(batch["early.targets"])])
        return batch | {"reference_logps": own, "early.reference_logps": early}

    def _referring(self, request: Request, inner: nn.Module, batch: dict[str, Tensor]) -> Request:
        """The request with what the reference has to say of its tokens: its output head, or its log-probs."""
        if "reference_logps" in batch:
            given = {name: batch[name] for name in ("top_ids", "top_reference_logps") if name in batch}
            return dataclasses.replace(request, given={"ref_logp": batch["reference_logps"], **given})
        if self.reference is None:
            return request
        layout = self.data_collator.layout
        if self.needs_reference_head:
            asked = dataclasses.replace(request, want=(), inside=self.inside)
            heads, given = self.reference.heads(inner, batch, layout, asked)
            heads = tuple(dataclasses.replace(head, temperature=self.temperature) for head in heads)
            # A teacher with another tokenizer has no log-prob of the student's token.
            more = () if self.retell is not None else ("ref_logp",)
            return dataclasses.replace(request, refs=heads, want=(*request.want, *more), given=given)
        answer = self.reference.answer(inner, batch, layout, dataclasses.replace(request, want=("logp",)))
        return dataclasses.replace(request, given={"ref_logp": answer["logp"]})

    def _completions(
        self, roles: Sequence[str], batch: dict[str, Tensor], answer: dict[str, Tensor]
    ) -> dict[str, Completions | Scores]:
        """The statistics of each role, cut from those of all tokens, or from the scores of all completions."""
        lengths = [batch[f"lengths.{role}"] for role in roles]
        if self.objective.scores:
            scores = answer["score"].split([len(one) for one in lengths])
            return {role: Scores(values=scores[i], lengths=lengths[i]) for i, role in enumerate(roles)}
        sizes = [int(n.sum()) for n in lengths]
        nothing = (None,) * len(sizes)
        parts = {name: values.split(sizes) for name, values in answer.items()}
        logps, reference = parts.pop("logp"), parts.pop("ref_logp", nothing)
        return {
            role: Completions(
                logps=logps[i],
                lengths=lengths[i],
                reference_logps=None if reference[i] is None else reference[i].detach(),
                more={name: split[i] for name, split in parts.items()},
            )
            for i, role in enumerate(roles)
        }

    def counts(self, batches: Sequence[dict[str, Tensor]], device: torch.device) -> Tensor:
        """[1 + roles] over all processes: rows, and tokens of each role."""
        rows = sum(batch[f"lengths.{self.roles[0]}"].numel() for batch in batches)
        tokens = [sum(int(batch[f"lengths.{role}"].sum()) for batch in batches) for role in self.roles]
        return self.accelerator.reduce(torch.tensor([rows, *tokens], dtype=torch.float64, device=device), "sum")

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """All micro-batches of the next optimizer step, each with the step's context, and their global counts."""
        if self.state.global_step >= self.state.max_steps:  # continued from its last checkpoint: transformers would go on
            self.control.should_training_stop = True
            return [], self.counts([], device)
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        while 0 < len(batches) < num_batches:  # a stream ended: without a whole step its gradients would go into the next one
            batches.append(self._empty_batch())
        batches = [self.referred(batch) for batch in self.learned_from(batches)]
        scalars = self.scalars(batches)
        batches = [batch | scalars for batch in batches]
        self.nonfinite.begin(batches)
        return batches, self.counts(batches, device)

    def _empty_batch(self) -> dict[str, Tensor]:
        return {name: tensor.to(self.args.device) for name, tensor in self.data_collator([]).items()}

    def get_train_dataloader(self) -> DataLoader:
        """Every row of an epoch once, over all processes, those of a table shared out by length; see loading.py."""
        rows, deal = self.train_dataset, by_position
        several = self.accelerator.num_processes * self.args.gradient_accumulation_steps > 1
        if several and not isinstance(rows, IterableDataset):
            deal = ByLength(tokens_of(rows, self.roles), self.data_collator)
        return loader(rows, self.data_collator, self.args, self.accelerator, training=True, deal=deal)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Every row to evaluate on once, over all processes; `eval_dataset` as inherited."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        rows = self.eval_dataset[rows] if isinstance(rows, str) else rows
        return loader(rows, self.data_collator, self.args, self.accelerator, training=False)

    def learned_from(self, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """The micro-batches of a step as it learns from them: those of the data."""
        return batches

    def release(self) -> None:
        """Give back what training needed beside the model: nothing."""

    def first_rows(self, count: int) -> list[dict[str, Any]]:
        """Rows to check the model with before it trains: the first of the data."""
        return list(itertools.islice(iter(self.train_dataset), count))

    def scalars(self, batches: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The context of the rows of all processes in `batches`, as entries of a batch: progress, running means, and the means
        of what the objective's `before` says of them."""
        scalars = self.context.scalars(self.state)
        if self.objective.before is not None:
            means = Meter()
            with torch.no_grad(), evaluating(self.model), self.compute_loss_context_manager():
                for batch in batches:
                    moved = {name: tensor.to(self.args.device) for name, tensor in batch.items()}
                    means.add(self.objective.before(self.config, self.statistics(self.model_wrapped, moved, early=True)))
            reduced = means.reduce(self.accelerator)
            scalars |= {name: torch.tensor(value, dtype=torch.float32) for name, value in reduced.items()}
        return {f"{context.PREFIX}{name}": value.to(self.args.device) for name, value in scalars.items()}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """This micro-batch's share of the step's mean loss, times the processes (gradients are averaged over them)."""
        statistics = self.statistics(model, inputs)
        loss = self.objective(self.config, statistics)
        counts = self.counts([inputs], self.args.device) if num_items_in_batch is None else num_items_in_batch
        meter = self.meter if model.training else self.eval_meter
        meter.add(self._logged(loss, statistics))
        meter.tokens(inputs)
        if model.training:
            self.context.remember(loss.remember)
        share = self._share(loss, counts) * self.accelerator.num_processes
        if model.training:
            self.nonfinite.look(share)
        return (share, statistics) if return_outputs else share

    def _share(self, loss: Loss, counts: Tensor) -> Tensor:
        units = ["row", *self.roles]
        total = loss.values.sum() / counts[units.index(loss.per)].clamp(min=1).to(loss.values.dtype)
        return total if loss.plus is None else total + self._share(loss.plus, counts)

    def _logged(self, loss: Loss, statistics: Any) -> dict[str, Tensor]:
        """The objective's metrics, and those that every method has."""
        logged = dict(loss.metrics)
        completions = {role: vars(statistics)[role] for role in self.roles}
        for role, one in completions.items():
            if isinstance(one, Completions):
                logged[f"logps/{role}"] = one.logp.detach()
                logged |= {name: values for name, values in one.more.items() if name.startswith(DROPPED)}
            logged[f"length/{role}"] = one.lengths.float()
        if self.reads_reference and not self.objective.reads_teacher:
            d = torch.cat([one.logratios.detach() for one in completions.values()])
            logged["kl"] = torch.expm1(-d) + d
        return logged

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Loss of one evaluation batch; its terms and metrics are summed for `evaluation_loop`."""
        inputs = {name: tensor.to(self.args.device) for name, tensor in inputs.items()} | self._eval_scalars
        with torch.no_grad(), self.compute_loss_context_manager():
            statistics = self.statistics(model, inputs)
            loss = self.objective(self.config, statistics)
        logged, term, i = self._logged(loss, statistics), loss, 0
        while term is not None:
            logged[f"loss.{i}"], term, i = term.values.detach(), term.plus, i + 1
        self.eval_meter.add(logged)
        # Of this batch, in one dtype on all processes, whatever rows they have; the loss of the set is the meter's.
        return loss.values.detach().sum().float(), None, None

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """As inherited, but loss and metrics are exact global means over the set, whatever the batches."""
        self.eval_meter.clear()
        self._eval_scalars = self.scalars(dataloader)
        output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        values = self.eval_meter.reduce(self.accelerator)
        terms = [values.pop(name) for name in list(values) if name.startswith("loss.")]
        output.metrics.update({f"{prefix}_{name}": value for name, value in values.items()})
        output.metrics[f"{prefix}_loss"] = sum(terms)
        return output

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As inherited, with the objective's own parameters in a group of their own."""
        new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if new and self.own is not None:
            learned.optimise_apart(optimizer, self.own, self.args.learning_rate)
        return optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As inherited; the objective's own parameters and a reference that moves are those of the checkpoint, too."""
        if resume_from_checkpoint:
            asked = resume_from_checkpoint
            folder = Path(get_last_checkpoint(self.args.output_dir) if asked is True else asked)
            if self.own is not None and not self.is_deepspeed_enabled:
                learned.load(self.own, folder)
            if isinstance(self.reference, MovingModel):
                self.reference.load(folder)
        return super().train(resume_from_checkpoint, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As inherited, with the metrics since the last training log."""
        if "loss" in logs:
            logs = {**logs, **self.meter.reduce(self.accelerator), **self.meter.rates(self.accelerator)}
            self.meter.clear()
            self._warn(logs)
        super().log(logs, start_time)

    def _warn(self, logs: dict[str, float]) -> None:
        """What the objective has to say of the metrics, each line once."""
        if self.objective.watch is None or not self.is_world_process_zero():
            return
        for line in self.objective.watch(self.config, logs):
            if line not in self._warned:
                self._warned.add(line)
                log.warning("step %d: %s", self.state.global_step, line)
