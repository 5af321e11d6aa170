"""A teacher with another tokenizer: it reads the text of the student's rows in tokens of its own.

The student's ids are decoded, special tokens left out, and tokenised anew, prompt and completion apart, with the teacher's
own special tokens at the beginning and its end token at the end; chat templates are not translated. The two tokenisations of
a completion are compared position by position up to the length of the shorter one, which is what ULD does: positions of the
same number stand for about the same text only as far as the tokenizers cut it alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from posttrain_kernels import Head
from torch import Tensor, nn

from .costs import some_rows
from .models import Request
from .reference import FrozenModel
from .trees import Batch, Layout, Row, TreeCollator

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PREFIX = "teacher."
"""Of the keys in a batch that hold the teacher's reading of it."""


@dataclass
class Retold:
    """Rows in the student's ids -> the batch of the same rows in the teacher's, its keys under `PREFIX`."""

    student: PreTrainedTokenizerBase
    """Decodes."""

    teacher: PreTrainedTokenizerBase
    """Tokenises."""

    longest: int | None
    """Tokens that the teacher can read: longer prompts lose their beginning, longer completions their end."""

    collator: TreeCollator
    """Lays the rows."""

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """The batch."""
        return {f"{PREFIX}{name}": tensor for name, tensor in self.collator([self.row(row) for row in rows]).items()}

    def row(self, row: Row) -> dict[str, Any]:
        """One row in the teacher's ids."""
        end = self.teacher.eos_token_id
        prompt = self.teacher(self._text(row["prompt"]))["input_ids"]
        if prompt[-1:] == [end]:
            prompt = prompt[:-1]
        prompt = prompt or [end]
        told: dict[str, Any] = {"prompt": prompt}
        for role in self.collator.roles:
            texts = [self._text(completion) for completion in row[role]]
            told[role] = [[*self.teacher(text, add_special_tokens=False)["input_ids"], end] for text in texts]
        if self.longest is not None:
            most = max(len(ids) for role in self.collator.roles for ids in told[role])
            told["prompt"] = prompt[-max(self.longest - most, 1) :]
            room = self.longest - len(told["prompt"])
            told |= {role: [ids[:room] for ids in told[role]] for role in self.collator.roles}
        return told

    def _text(self, ids: Sequence[int]) -> str:
        return self.student.decode(ids, skip_special_tokens=True)


class Foreign:
    """A teacher of its own tokens, beside a student whose batches `Retold` has told it.

    Args:
        member: the teacher.
    """

    def __init__(self, member: FrozenModel) -> None:
        self.member = member
        self.description = f"{member.description}, with a tokenizer of its own"

    @property
    def models(self) -> list[nn.Module]:
        """The teacher's model."""
        return [self.member.lm]

    def body(self, model: nn.Module) -> PreTrainedModel:
        """The transformers model that answers."""
        return self.member.body(model)

    def prepare(self, accelerator: Any) -> None:
        """Move or partition it."""
        self.member.prepare(accelerator)

    def heads(
        self, model: nn.Module, batch: Batch, layout: Layout, request: Request
    ) -> tuple[tuple[Head, ...], dict[str, Tensor]]:
        """Its output head, for each of the student's tokens on its own token of the same number, and `paired` [N]: 1 where it
        has one, 0 where its completion is the shorter one."""
        told = {name.removeprefix(PREFIX): tensor for name, tensor in batch.items() if name.startswith(PREFIX)}
        asked = dataclasses.replace(request, gather=told["gather"], targets=told["targets"])
        (head,), inside = self.member.heads(model, told, layout, asked)
        roles = [name for name in told if name.startswith("lengths.")]
        own, theirs = (torch.cat([side[name] for name in roles]) for side in (batch, told))
        index, paired = aligned(own, theirs)
        return (some_rows(head, index),), {**inside, "paired": paired}


def aligned(lengths: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """For each token of completions laid end to end, the one of the same number in others of the same completions.

    Args:
        lengths: [B] tokens of each completion.
        others: [B] tokens of each among the others.

    Returns:
        [N] int64 the other token, the last of its completion where there is none of that number; [N] float32 1 where there is.
    """
    spread = lambda values: values.repeat_interleave(lengths)  # noqa: E731
    position = torch.arange(int(lengths.sum()), device=lengths.device) - spread(lengths.cumsum(0) - lengths)
    last = spread(others) - 1
    return spread(others.cumsum(0) - others) + torch.minimum(position, last), (position <= last).float()
