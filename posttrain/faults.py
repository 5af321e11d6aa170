"""What can go wrong while a run trains, and what is done about it: numbers that are not finite, disks that take no more.

A loss or gradient that is not finite is looked at once a step, on the device, and decided upon by all processes together. In a
step of DeepSpeed the optimizer follows the last backward at once, so its losses are looked at before that, its gradient after.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainingArguments

from .schema import UserError

if TYPE_CHECKING:
    from .trainer import Trainer

log = logging.getLogger("posttrain")

Policy = Literal["stop", "skip", "go_on"]
"""stop: end the run, with the batch saved for inspection; skip: leave the step out; go_on: do not look."""

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


class NonFinite(TrainerCallback):
    """Looks at the losses and the gradient of every step.

    Args:
        trainer: whose.
        policy: what to do.

    Raises:
        UserError: while training: a number was not finite and the policy is to stop; says where the batch is.
    """

    def __init__(self, trainer: Trainer, policy: Policy) -> None:
        self.trainer, self.policy = trainer, policy
        self._batches: Sequence[Mapping[str, Tensor]] = ()
        self._finite: list[Tensor] = []

    def begin(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """The micro-batches of the next step of this process."""
        self._batches, self._finite = batches, []

    def look(self, loss: Tensor) -> None:
        """Take note of a micro-batch's loss; nothing waits for the device, except before DeepSpeed's step."""
        if self.policy == "go_on":
            return
        self._finite.append(loss.detach().isfinite())
        trainer = self.trainer
        if trainer.is_deepspeed_enabled and trainer.accelerator.sync_gradients:
            self._decide(torch.ones((), device=loss.device))

    def on_pre_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide about the step; what scaled float16 gradients do is the scaler's business."""
        if self.policy != "go_on" and not args.fp16:
            self._decide(self._gradient())

    def _gradient(self) -> Tensor:
        """[] whether the gradient is finite."""
        trainer = self.trainer
        if trainer.is_deepspeed_enabled:
            norm = torch.as_tensor(trainer.model_wrapped.get_global_grad_norm())
        else:
            norm = torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters() if p.grad is not None])
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).isfinite()

    def _decide(self, gradient: Tensor) -> None:
        trainer = self.trainer
        losses = torch.stack(self._finite).all().to(gradient.device)
        wrong = (~torch.stack([losses, gradient.bool()])).double().to(trainer.accelerator.device)
        loss, gradient = (count > 0 for count in trainer.accelerator.reduce(wrong, "sum").tolist())
        if not loss and not gradient:
            return
        step = trainer.state.global_step + 1
        what = "loss" if loss else "gradient"
        if self.policy == "skip":
            log.warning("step %d is left out: its %s is not finite", step, what)
            trainer.context.skip()
            for parameter in trainer.model.parameters():
                parameter.grad = None
            return
        folder = Path(trainer.args.output_dir, f"nonfinite-step-{step}")
        self._save(folder, None if loss else range(len(self._batches)))
        raise UserError(
            f"step {step}: the {what} is not finite; the batch is in {folder}, the last checkpoint is from before it "
            "(nonfinite: skip leaves such steps out, go_on takes them)"
        )

    def _save(self, folder: Path, chosen: Sequence[int] | None) -> None:
        """Write micro-batches of this process; None: those whose loss is not finite."""
        if chosen is None:
            chosen = [i for i, finite in enumerate(self._finite) if not finite]
        if not chosen:
            return
        tensors = {f"{i}/{name}": t.cpu().clone() for i in chosen for name, t in self._batches[i].items()}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / f"process-{self.trainer.args.process_index}.safetensors")


@contextlib.contextmanager
def writing(output: Path, setting: str = "train.output_dir") -> Iterator[None]:
    """Turn what a full or read-only disk makes of writing into one line; files elsewhere are another's business.

    Args:
        output: the file or folder that is written.
        setting: what names it.

    Raises:
        UserError: it could not be written; says why.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        named = error.filename if isinstance(error, OSError) and isinstance(error.filename, str) else output
        reason, place, named = refused(error), output.absolute(), Path(named).absolute()
        if reason is None or not (named in place.parents or named.is_relative_to(place.parent)):
            raise
        above = f"{named}: " if named in place.parents else ""
        raise UserError(
            f"{setting}: {output} cannot be written: {above}{reason}; what was complete there still is, and the same command "
            "continues from it"
        ) from None


def refused(error: Exception) -> str | None:
    """Why the disk refused a write; None where the error is about something else."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in _DISK else None
    if isinstance(error, SafetensorError):
        found = re.search(r"os error (\d+)", str(error))
        return os.strerror(int(found[1])) if found else None
    # torch's writer keeps the reason to itself
    return "the disk takes no more" if "PytorchStreamWriter" in str(error) or "inline_container" in str(error) else None
