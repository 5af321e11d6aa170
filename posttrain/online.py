"""Training on completions that the models write: rollouts inside the training step, before its losses.

Whether a step learns from the data, from the student's rollouts or from the teacher's is drawn once for the whole step, from
the seed and the number of the step; the randomness of a rollout comes from these and its prompt. So neither depends on how a
step is split into micro-batches and processes, and a resumed run samples what the uninterrupted one does.

Source: on-policy distillation: Agarwal et al. 2024 (GKD), arXiv:2306.13649, algorithm 1, whose lambda is `student` (there drawn
for each batch, too); sampling from the teacher: Kim & Rush 2016 (SeqKD), arXiv:1606.07947; corrections: corrections.py.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .corrections import corrected, worst_disagreement
from .engines.hf import HFEngine
from .engines.rollout import Engine, cut, derived
from .models import Request, model_inputs
from .reference import AdapterOff, FrozenModel
from .settings import RolloutsConfig, SamplingConfig
from .stats import Top
from .trainer import Trainer
from .trees import prompts_of

Writer = Literal["data", "student", "teacher"]


class OnlineTrainer(Trainer):
    """A trainer that replaces the completions of some steps by rollouts.

    Args:
        rollouts: whose completions, and how many corrections.
        sampling: how they are sampled.
        engine: from the policy, wrapped as it is trained, to what samples from it.
        ends: tokens that end a completion.
        pad: token that fills rows up.
        kwargs: those of `Trainer`.
    """

    def __init__(
        self,
        *,
        rollouts: RolloutsConfig,
        sampling: SamplingConfig,
        engine: Callable[[Callable[[], nn.Module]], Engine],
        ends: Sequence[int],
        pad: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.rollouts, self.sampling, self.ends, self.pad = rollouts, sampling, tuple(ends), pad
        self._engine, self._engines = engine, {}

    def learned_from(self, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """The micro-batches of a step: as they are, or their prompts with completions of the student or the teacher."""
        writer = self.writer(self.state.global_step)
        self.meter.add({f"rollouts/{name}": torch.tensor([float(writer == name)]) for name in ("student", "teacher")})
        return batches if writer == "data" else [self._written(batch, writer) for batch in batches]

    def writer(self, step: int) -> Writer:
        """Who writes the completions of a step."""
        drawn = np.random.default_rng(derived(self.sampling.seed, step)).random()
        if drawn < self.rollouts.student:
            return "student"
        return "teacher" if drawn < self.rollouts.student + self.rollouts.teacher else "data"

    def _written(self, batch: dict[str, Tensor], writer: Writer) -> dict[str, Tensor]:
        prompts = prompts_of(batch)
        seeds = [derived(self.sampling.seed, self.state.global_step, _number(prompt)) for prompt in prompts]
        with self._teaching() if writer == "teacher" else contextlib.nullcontext():
            engine = self._sampler(writer)
            engine.sync(self.state.global_step)
            rollouts = engine.generate(prompts, seeds=seeds)
        completions, ended = [one.completion for one in rollouts], [float(one.finished) for one in rollouts]
        for turn in range(self.rollouts.corrections if writer == "student" else 0):
            completions = self._corrected(prompts, completions, [derived(seed, turn) for seed in seeds])
            ended = [float(cut(completion, self.ends)[1]) for completion in completions]
        lengths = [float(len(completion)) for completion in completions]
        self.meter.add({"rollouts/ended": torch.tensor(ended), "rollouts/length": torch.tensor(lengths)})
        return self._laid(prompts, completions)

    def _laid(self, prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> dict[str, Tensor]:
        (role,) = self.roles
        rows = [{"prompt": prompt, role: [one]} for prompt, one in zip(prompts, completions, strict=True) if one]
        return {name: tensor.to(self.args.device) for name, tensor in self.data_collator(rows).items()}

    def _sampler(self, writer: Writer) -> Engine:
        """The engine of a writer, made when it is needed first: the models are wrapped by then."""
        if writer not in self._engines:
            if writer == "student":
                self._engines[writer] = self._engine(lambda: self.model_wrapped)
            else:
                teacher = self.reference.members[0]
                model = teacher.model if isinstance(teacher, FrozenModel) else self.model_wrapped
                more = {"ends": self.ends, "pad": self.pad, "tokenizer": self.processing_class}
                self._engines[writer] = HFEngine(model, self.sampling, **more)
        return self._engines[writer]

    def release(self) -> None:
        """End the engines."""
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()

    def _teaching(self) -> contextlib.AbstractContextManager[Any]:
        """While the teacher writes: the adapter off, where it is the student without one."""
        if isinstance(self.reference.members[0], AdapterOff):
            return self.accelerator.unwrap_model(self.model).disable_adapter()
        return contextlib.nullcontext()

    def _corrected(self, prompts: list[list[int]], completions: list[list[int]], seeds: list[int]) -> list[list[int]]:
        """The completions with their worst token replaced by the teacher's likeliest, written on by the student from there."""
        theirs, kl = self._compared(self._laid(prompts, completions))
        lengths = [len(completion) for completion in completions]
        mask = torch.arange(max(lengths, default=0)) < torch.tensor(lengths)[:, None]  # [B, T]
        padded = lambda rows: pad_sequence([row.cpu() for row in rows], batch_first=True)  # noqa: E731
        ours = [torch.tensor(completion) for completion in completions]
        sides = (padded(rows) for rows in (ours, theirs.split(lengths), kl.split(lengths)))
        positions = worst_disagreement(*sides, mask).tolist() if lengths else []  # without rows others still sample below
        told = [row.tolist() for row in theirs.split(lengths)]
        kept = [corrected(*one) for one in zip(completions, told, positions, strict=True)]
        whole = [position < 0 or ids[-1] in self.ends for ids, position in zip(kept, positions, strict=True)]
        open_ = [i for i, done in enumerate(whole) if not done and len(kept[i]) < self.sampling.max_new_tokens]
        written = self._sampler("student").generate([prompts[i] + kept[i] for i in open_], seeds=[seeds[i] for i in open_])
        for i, rollout in zip(open_, written, strict=True):
            kept[i] = [*kept[i], *rollout.completion][: self.sampling.max_new_tokens]
        return kept

    def _compared(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """[N] the teacher's likeliest tokens and [N] KL(teacher || student), at every token of a batch."""
        model, inner = self.model_wrapped, self.accelerator.unwrap_model(self.model_wrapped)
        request = Request(
            gather=batch["gather"], targets=batch["targets"], want=("logp", "forward_kl", Top(k=1)), impl=self.impl
        )
        with torch.no_grad(), self.compute_loss_context_manager():
            request = self._referring(request, inner, batch)
            said = model(**model_inputs(inner, batch, self.data_collator.layout), statistics=request)
        return said["top_ids"][:, 0], said["forward_kl"]


def _number(prompt: Sequence[int]) -> int:
    """A number fixed by a prompt."""
    return int.from_bytes(hashlib.blake2b(np.asarray(prompt, dtype=np.int32).tobytes(), digest_size=8).digest(), "little")
