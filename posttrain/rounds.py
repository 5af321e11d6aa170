"""A round of rollouts: the prompts that are sampled at once, and what is learned from what was written to them.

A round is held as a few flat tensors. So it goes into a checkpoint as it is, and a run that was killed in its middle learns
the rest of it from the same numbers.

Letters in shape comments: P prompts of a process in a round, G completions each, B = P * G; N tokens of all completions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .conversations import Text
from .engines.rollout import Rollout
from .replacing import replacing
from .schema import UserError

_TOKEN = "token."


@dataclass(frozen=True)
class Prompts:
    """Rows as they come from the loader, fillers (None) among them; nothing for a model yet."""

    rows: Sequence[Mapping[str, Any] | None]


def gather_prompts(rows: Sequence[Mapping[str, Any] | None]) -> dict[str, Prompts]:
    """A collator that leaves rows as they are."""
    return {"rows": Prompts(rows)}


@dataclass(frozen=True)
class Asked:
    """One prompt of a round."""

    step: int
    """Of the round's steps, the one that learns from it."""

    place: int
    """Its number among the prompts of all processes in the round, however they are split."""

    ids: list[int]
    """Its tokens."""

    text: Text
    """As the data has it, for scorers."""

    row: Mapping[str, Any]
    """The columns of its row, for scorers."""

    @classmethod
    def of(cls, row: Mapping[str, Any], step: int, place: int) -> Asked:
        """The prompt in a row of data that was loaded with `source`."""
        stored = json.loads(row["source"])
        return cls(step, place, list(row["prompt"]), stored["prompt"], stored["row"])


@dataclass(frozen=True, kw_only=True)
class Round:
    """What is learned from, on one process."""

    version: int
    """Optimizer steps that were done when it was sampled."""

    steps: int
    """Steps of one pass over it, the same on every process."""

    group: int
    """G."""

    step: Tensor
    """[P] int64 the step of a pass that learns from each prompt."""

    prompts: Tensor
    """Tokens of all prompts, end to end."""

    prompt_lengths: Tensor
    """[P] int64."""

    completions: Tensor
    """[N] tokens."""

    lengths: Tensor
    """[B] int64."""

    keep: Tensor
    """[B] bool, the completions that are learned from."""

    tokens: Mapping[str, Tensor]
    """[N] each: the numbers of each token, by name."""

    def rows(self, step: int) -> list[dict[str, Any]]:
        """The rows of a step of a pass, with the completions that are kept, as the collator takes them."""
        prompts = self.prompts.split(self.prompt_lengths.tolist())
        sizes = self.lengths.tolist()
        parts = {"completion": self.completions.split(sizes)}
        parts |= {f"{_TOKEN}{name}": values.split(sizes) for name, values in self.tokens.items()}
        found = []
        for number in (self.step == step).nonzero().flatten().tolist():
            members = range(number * self.group, (number + 1) * self.group)
            kept = [at for at in members if self.keep[at]]
            found.append({"prompt": prompts[number].tolist()} | {name: [of[at] for at in kept] for name, of in parts.items()})
        return found

    def save(self, path: Path) -> None:
        """Write it, beside and renamed."""
        named = ("step", "prompts", "prompt_lengths", "completions", "lengths", "keep")
        tensors = {name: vars(self)[name] for name in named} | {f"{_TOKEN}{name}": v for name, v in self.tokens.items()}
        _write(path, tensors, {"version": self.version, "steps": self.steps, "group": self.group})

    @classmethod
    def load(cls, path: Path) -> Round:
        """Read what `save` wrote.

        Raises:
            UserError: it is damaged.
        """
        tensors, numbers = _read(path)
        tokens = {name.removeprefix(_TOKEN): tensors.pop(name) for name in sorted(tensors) if name.startswith(_TOKEN)}
        return cls(**tensors, tokens=tokens, **numbers)


def pack(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows of numbers end to end, and the length of each."""
    values = torch.tensor([value for row in rows for value in row], dtype=torch.int64)
    return values, torch.tensor([len(row) for row in rows], dtype=torch.int64)


def save_rollouts(path: Path, rollouts: Sequence[Rollout], version: int) -> None:
    """Keep rollouts that something went wrong with before they were learned from."""
    prompts, prompt_lengths = pack([one.prompt for one in rollouts])
    completions, lengths = pack([one.completion for one in rollouts])
    tensors = {
        "prompts": prompts,
        "prompt_lengths": prompt_lengths,
        "completions": completions,
        "lengths": lengths,
        "logps": torch.tensor([logp for one in rollouts for logp in one.logps or ()], dtype=torch.float64),
        "finished": torch.tensor([one.finished for one in rollouts], dtype=torch.bool),
        "group": torch.tensor([one.group for one in rollouts], dtype=torch.int64),
    }
    _write(path, tensors, {"version": version})


def load_rollouts(path: Path, version: int) -> list[Rollout] | None:
    """The rollouts that `save_rollouts` kept of a version; None where there are none."""
    if not path.is_file():
        return None
    tensors, numbers = _read(path)
    if numbers["version"] != version:
        return None
    prompts = tensors["prompts"].split(tensors["prompt_lengths"].tolist())
    sizes = tensors["lengths"].tolist()
    parts = zip(prompts, tensors["completions"].split(sizes), tensors["logps"].split(sizes), strict=True)
    marks = zip(tensors["finished"].tolist(), tensors["group"].tolist(), strict=True)
    return [
        Rollout(prompt.tolist(), completion.tolist(), logps.tolist(), finished, group, version)
        for (prompt, completion, logps), (finished, group) in zip(parts, marks, strict=True)
    ]


def _write(path: Path, tensors: Mapping[str, Tensor], numbers: Mapping[str, int]) -> None:
    whole = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}  # no two share memory
    with replacing(path) as partial:
        save_file(whole, partial, metadata={name: str(number) for name, number in numbers.items()})


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, int]]:
    try:
        with safe_open(path, framework="torch") as file:
            numbers = {name: int(value) for name, value in (file.metadata() or {}).items()}
            return {name: file.get_tensor(name) for name in file.keys()}, numbers  # noqa: SIM118  it is no mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"rollouts: {path} is damaged ({error}); delete it, or continue from another checkpoint") from None
