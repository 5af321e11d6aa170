"""Training on rounds of rollouts: sample, score, draw the lesson, learn from it, inside the steps of the trainer.

A round starts before the first of its optimizer steps: the prompts of all its steps are sampled with the weights of that
moment, scored, and read without gradient; the objective's `lesson` says what is learned from them. Everything random belongs
to the step and to a prompt's number in the round. So nothing depends on how a step is split into micro-batches and processes,
and a resumed run samples what the uninterrupted one does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from .engines.rollout import Engine, Rollout, derived, judge, text_of, truncation_warning
from .experience import Experience, Lesson
from .loading import Plan, loader
from .models import evaluating
from .rewards.scorer import Reward, Scored
from .rounds import Asked, Round, gather_prompts, load_rollouts, pack, save_rollouts
from .schema import UserError
from .settings import GROUP, RolloutsConfig, SamplingConfig
from .stats import bound
from .trainer import Trainer, log
from .transcript import Transcript, lines, reward_metrics, rollout_metrics

T = TypeVar("T")

_REFERENCE = "reference_logps"
"""What the reference said when the round was sampled, among its numbers of each token."""

_EVALUATION = 1
"""Tells the random numbers of an evaluation from those of a round."""


class StepTrainer(Trainer):
    """A trainer of an online objective.

    Args:
        rollouts: how many completions, and how often.
        sampling: how they are sampled.
        reward: what they are worth.
        engine: from the policy, wrapped as it is trained, to what samples from it.
        kwargs: those of `Trainer`; the rows are prompts that were loaded with `source`, `processing_class` is the tokenizer.

    Raises:
        UserError: as `Trainer`.
    """

    def __init__(
        self,
        *,
        rollouts: RolloutsConfig,
        sampling: SamplingConfig,
        reward: Reward,
        engine: Callable[[Callable[[], nn.Module]], Engine],
        **kwargs: Any,
    ) -> None:
        super().__init__(temperature=sampling.temperature, **kwargs)
        assert self.roles == ["completion"], "an online objective learns from one role, `completion`"
        self.group, self.every, self.passes = rollouts.group_size or GROUP, rollouts.every or 1, rollouts.epochs or 1
        self.sampling, self.reward = sampling, reward
        self._build, self._engine = engine, None
        self._round: Round | None = None
        self.failure: UserError | None = None
        """What ended the training; raised when all is saved."""
        self.transcript = Transcript(Path(self.args.output_dir))
        self.add_callback(self.transcript)
        self._kept = KeptRound(self)
        self.add_callback(self._kept)
        if warning := truncation_warning(sampling):
            log.warning("%s", warning)

    @property
    def plan(self) -> Plan:
        """How an epoch is cut into rounds."""
        args, processes = self.args, self.accelerator.num_processes
        sizes = (args.train_batch_size, args.gradient_accumulation_steps, processes)
        return Plan(*sizes, self.every, self.passes, args.dataloader_drop_last)

    @property
    def round_in_use(self) -> Round | None:
        """The round that the next step learns from, if it is not to sample another."""
        one = self._round
        return one if one is not None and self.state.global_step < one.version + one.steps * self.passes else None

    def get_train_dataloader(self) -> DataLoader:
        """The prompts of an epoch by rounds; see `Plan`."""
        return loader(self.train_dataset, gather_prompts, self.args, self.accelerator, training=True, plan=self.plan)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The prompts to evaluate on; `eval_dataset` as inherited."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        rows = self.eval_dataset[rows] if isinstance(rows, str) else rows
        return loader(rows, gather_prompts, self.args, self.accelerator, training=False)

    def first_rows(self, count: int) -> list[dict[str, Any]]:
        """The first prompts, continued by their own last tokens, forwards and backwards."""
        found = []
        for row in super().first_rows(count):
            tail = list(row["prompt"][-8:])
            sides = [tail, tail[::-1]]
            zeros = {f"token.{name}": [torch.zeros(len(side)) for side in sides] for name in self.tokens}
            found.append({"prompt": row["prompt"], "completion": sides} | zeros)
        return found

    def learned_from(self, batches: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """The micro-batches of a step, of the round in use or of a new one; none where a stream ended or that cannot be had."""
        if not batches:
            return []
        try:
            if self.round_in_use is None:
                self._round = self._sampled([batch["rows"].rows for batch in batches])
        except UserError as error:
            return self._leave(error)
        now = self._round
        rows = now.rows((self.state.global_step - now.version) % now.steps)
        return self._laid(rows, len(batches), now.tokens.get(_REFERENCE))

    def _laid(self, rows: Sequence[dict[str, Any]], count: int, known: Tensor | None = None) -> list[dict[str, Tensor]]:
        """Rows as so many micro-batches, the last of them smaller or empty; `known` as for `_batch`."""
        size = self.args.train_batch_size
        if len(rows) > size * count:
            raise UserError(
                f"train: the checkpoint is in the middle of a round of {len(rows)} prompts a step on a process, and "
                f"per_device_train_batch_size x gradient_accumulation_steps is {size * count} now; take the same sizes"
            )
        parts = [self._batch(rows[start : start + size], known) for start in range(0, size * count, size)]
        return [{name: tensor.to(self.args.device) for name, tensor in part.items()} for part in parts]

    def _batch(self, rows: Sequence[dict[str, Any]], known: Tensor | None) -> dict[str, Tensor]:
        """Rows as a micro-batch; with what the reference said of their tokens, so that it need not be asked again.

        Args:
            known: what it said of all tokens of the round, if that is known.
        """
        batch = self.data_collator(rows)
        if known is None:
            return batch
        return batch | {_REFERENCE: torch.cat([known[:0], *(one for row in rows for one in row[f"token.{_REFERENCE}"])])}

    def _sampled(self, batches: Sequence[Sequence[Any]]) -> Round:
        """A new round: its prompts sampled, scored and read, and the lesson drawn.

        Raises:
            UserError: on all processes alike: the engine fails, a scorer does, or the engine has other weights.
        """
        asked, steps = self._asked(batches)
        engine, version = self.engine(), self.state.global_step
        engine.sync(version)
        prompts, seeds = [one.ids for one in asked], [derived(self.sampling.seed, version, one.place) for one in asked]
        kept = self._together(lambda: load_rollouts(self._unscored, version))
        if not all(gather_object([kept is not None and [one.prompt for one in kept[:: self.group]] == prompts])):
            kept = self._together(lambda: engine.generate(prompts, self.group, seeds=seeds))
        try:
            texts, scored = self._together(lambda: self._scored(asked, kept))
        except UserError:
            save_rollouts(self._unscored, kept, version)
            raise
        read = self._read_all(self._unlearned(asked, kept, steps), steps, len(batches))
        lesson = self._lesson(kept, scored, read)
        self._tell(asked, kept, texts, scored, lesson)
        self._unscored.unlink(missing_ok=True)
        blank = self._unlearned(asked, kept, steps)
        tokens = {name: lesson.tokens[name].detach().cpu() for name in self.tokens}
        if "ref_logp" in read and not self.needs_reference_head:
            tokens[_REFERENCE] = read["ref_logp"].cpu()
        return Round(**{**vars(blank), "keep": lesson.keep.cpu(), "tokens": tokens})

    def _asked(self, batches: Sequence[Sequence[Any]]) -> tuple[list[Asked], int]:
        """The prompts of this process, step after step, and the number of steps that anyone has some for.

        Raises:
            UserError: nobody has any: the checkpoint was in the middle of a round and came without it.
        """
        plan, process = self.plan, self.accelerator.process_index
        asked = [
            Asked.of(row, step, plan.place(step, micro, process, at))
            for step in range(self.every)
            for micro, rows in enumerate(batches)
            for at, row in enumerate(rows[step * plan.batch_size : (step + 1) * plan.batch_size])
            if row is not None
        ]
        mine = torch.tensor([asked[-1].step + 1 if asked else 0], device=self.args.device)
        steps = int(self.accelerator.gather(mine).max())
        if not steps:
            raise UserError(
                f"train.resume_from_checkpoint: step {self.state.global_step} is in the middle of a round of rollouts that the "
                "checkpoint does not hold"
            )
        return asked, steps

    def _scored(self, asked: Sequence[Asked], rollouts: Sequence[Rollout]) -> tuple[list[str], Scored]:
        """The completions as text, and what they are worth."""
        texts = [text_of(one, self.processing_class) for one in rollouts]
        owners = [one for one in asked for _ in range(len(rollouts) // max(len(asked), 1))]
        return texts, self.reward([one.text for one in owners], texts, [one.row for one in owners])

    def _unlearned(self, asked: Sequence[Asked], rollouts: Sequence[Rollout], steps: int) -> Round:
        """The round before anyone knows what to learn from it: all completions, and 0 at every token."""
        prompts, prompt_lengths = pack([one.ids for one in asked])
        completions, lengths = pack([one.completion for one in rollouts])
        return Round(
            version=self.state.global_step,
            steps=steps,
            group=self.group,
            step=torch.tensor([one.step for one in asked], dtype=torch.int64),
            prompts=prompts,
            prompt_lengths=prompt_lengths,
            completions=completions,
            lengths=lengths,
            keep=torch.ones(len(rollouts), dtype=torch.bool),
            tokens={name: torch.zeros(len(completions)) for name in self.tokens},
        )

    def _read_all(self, of: Round, steps: int, count: int) -> dict[str, Tensor]:
        """[N] each: what policy and reference say of the tokens of a round, read in the micro-batches that it is learned in."""
        want = tuple(bound(self.want, self.context.scalars(self.state)))
        parts: dict[str, list[Tensor]] = {}
        with torch.no_grad(), evaluating(self.model), self.compute_loss_context_manager():
            for batch in (one for step in range(steps) for one in self._laid(of.rows(step), count)):
                for name, values in self._read(self.model_wrapped, batch, self.roles, want)[1].items():
                    parts.setdefault(name, []).append(values)
        return {name: torch.cat(values) for name, values in parts.items()}

    def _lesson(self, rollouts: Sequence[Rollout], scored: Scored, read: dict[str, Tensor]) -> Lesson:
        """What the objective makes of the round; says too how far the engine is off.

        Raises:
            UserError: so far that it cannot have sampled from these weights.
        """
        device, more = self.args.device, dict(read)
        old, reference = more.pop("logp"), more.pop("ref_logp", None)
        engine = torch.tensor([logp for one in rollouts for logp in one.logps], dtype=old.dtype, device=device)
        total = lambda values: self.accelerator.reduce(values, "sum")  # noqa: E731
        apart = (engine - old).abs().double().exp()
        self.meter.add({"rollouts/mismatch": apart, "rollouts/mismatch/max": apart})
        summed = total(torch.stack([apart.sum(), apart.new_tensor(len(apart))]))
        if summed[1] > 0 and not self.sampling.truncated:
            judge(float(summed[0] / summed[1]), f"step {self.state.global_step}: the engine")
        scalars = {name: value.to(device) for name, value in self.context.scalars(self.state).items()}
        experience = Experience(
            scores=torch.tensor(scored.total, dtype=old.dtype, device=device),
            lengths=torch.tensor([len(one.completion) for one in rollouts], dtype=torch.int64, device=device),
            group=self.group,
            finished=torch.tensor([one.finished for one in rollouts], dtype=torch.bool, device=device),
            old_logps=old,
            engine_logps=engine,
            reference_logps=reference,
            more=more,
            context=scalars,
            total=total,
        )
        lesson = self.objective.lesson(self.config, experience)
        assert lesson.keep.shape == experience.lengths.shape, "one entry of keep for each completion"
        assert all(lesson.tokens[name].shape == old.shape for name in self.tokens), "one number for each token"
        if reference is not None:
            self.meter.add({"rollouts/kl": experience.completion.logratio})
        self.meter.add(lesson.metrics)
        self.context.remember(lesson.remember)
        return lesson

    def _tell(
        self, asked: Sequence[Asked], rollouts: Sequence[Rollout], texts: Sequence[str], scored: Scored, lesson: Lesson
    ) -> None:
        """Log the round, and write it down for people."""
        self.meter.add(reward_metrics(scored) | rollout_metrics(rollouts, self.group, lesson.keep))
        step, decode = self.state.global_step, self.processing_class.decode
        told = gather_object(lines(asked, rollouts, texts, scored, lesson.keep.tolist(), step=step, decode=decode))
        if self.is_world_process_zero():
            self.transcript.add(sorted(told, key=lambda line: line["place"]))

    def engine(self) -> Engine:
        """What samples, made when it is needed first: the model is wrapped by then."""
        if self._engine is None:
            self._engine = self._build(lambda: self.model_wrapped)
        return self._engine

    def release(self) -> None:
        """End the engine."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    @property
    def _unscored(self) -> Path:
        """Where rollouts are kept that could not be scored."""
        return Path(self.args.output_dir, f"unscored-{self.args.process_index}.safetensors")

    def _together(self, work: Callable[[], T]) -> T:
        """What `work` gives on this process.

        Raises:
            UserError: on all processes, where one raises it: none is left waiting for another.
        """
        found, wrong = None, None
        try:
            found = work()
        except UserError as error:
            wrong = str(error)
        wrong = [one for one in gather_object([wrong]) if one is not None]
        if wrong:
            raise UserError(wrong[0])
        return found

    def _leave(self, error: UserError) -> list[Any]:
        """No batch: the training ends as if it had been told to, with a checkpoint of the steps that are done."""
        step = self.state.global_step
        save = step > 0 and self._kept.last != step
        self.control.should_training_stop = True
        self.control.should_save = self.control.should_log = save
        where = f"; step {step} is saved, and the same command continues from there" if step else ""
        self.failure = UserError(f"{error}{where}")
        return []

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """One completion of each prompt to evaluate on, scored. Its loss is minus its reward, so that less is better."""
        rows = [Asked.of(row, 0, 0) for row in inputs["rows"].rows if row is not None]
        engine = self.engine()
        engine.sync(self.state.global_step)
        seeds = [derived(self.sampling.seed, _EVALUATION, *one.ids) for one in rows]
        rollouts = self._together(lambda: engine.generate([one.ids for one in rows], seeds=seeds))
        _, scored = self._together(lambda: self._scored(rows, rollouts))
        numbers = {"length": [len(one.completion) for one in rollouts], "finished": [one.finished for one in rollouts]}
        logged = {name: torch.tensor(values, dtype=torch.float64) for name, values in numbers.items()}
        loss = -torch.tensor(scored.total, dtype=torch.float64)
        self.eval_meter.add(reward_metrics(scored) | logged | {"loss.0": loss})
        return loss.sum(), None, None

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As inherited; the round in use is that of the checkpoint.

        Raises:
            UserError: what ended the training before its time, once everything is saved.
        """
        if resume_from_checkpoint:
            asked = resume_from_checkpoint
            self._round = self._restored(Path(get_last_checkpoint(self.args.output_dir) if asked is True else asked))
        result = super().train(resume_from_checkpoint, **kwargs)
        if self.failure is not None:
            self.release()
            raise self.failure
        return result

    def _restored(self, folder: Path) -> Round | None:
        """The round in use when a checkpoint was written; None where the next step samples another.

        Raises:
            UserError: other processes wrote it.
        """
        wrote, processes = len(list(folder.glob("round-*.safetensors"))), self.accelerator.num_processes
        if wrote not in (0, processes):
            raise UserError(
                f"train.resume_from_checkpoint: {folder} is in the middle of a round of rollouts that {wrote} processes share, "
                f"this run has {processes}; use {wrote}"
            )
        return Round.load(round_file(folder, self.args.process_index)) if wrote else None


class KeptRound(TrainerCallback):
    """Writes the round in use into each checkpoint; a training that failed is not evaluated."""

    def __init__(self, trainer: StepTrainer) -> None:
        self.trainer = trainer
        self.last: int | None = None
        """Step of the last checkpoint."""

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """The rest of the round goes into the checkpoint."""
        self.last, one = state.global_step, self.trainer.round_in_use
        if one is not None:
            one.save(round_file(Path(args.output_dir, f"checkpoint-{state.global_step}"), args.process_index))

    def on_epoch_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Without an engine there is nothing to evaluate with."""
        if self.trainer.failure is not None:
            control.should_evaluate = False


def round_file(folder: Path, process: int) -> Path:
    """The file of a checkpoint that holds a process's part of the round in use."""
    return folder / f"round-{process}.safetensors"
