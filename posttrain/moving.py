"""A reference that follows the policy: a second model whose weights are a moving average of the policy's.

    reference <- (1 - rate) reference + rate policy     every `period` optimizer steps

Source: in RLHF, TRL's and OpenRLHF's synchronised references; for preference methods, Gorbatovski et al. 2024, "Learn Your
Reference Model for Real Good Alignment", arXiv:2404.09656 (the soft update of TR-DPO, whose alpha is `rate`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from .models import causal_lm
from .reference import FrozenModel
from .schema import UserError

if TYPE_CHECKING:
    from .trainer import Trainer

FILE = "reference.safetensors"
"""Beside the weights in a checkpoint."""


class MovingModel(FrozenModel):
    """The second model, in float32 so that small steps are not rounded away.

    Args:
        model: where it starts.
        name: of that model, for descriptions.
        rate: share of the policy at each update.
        period: optimizer steps from one to the next.
    """

    def __init__(self, model: nn.Module, name: str, rate: float, period: int) -> None:
        super().__init__(model.float(), name)
        self.rate, self.period = rate, period
        self.description = f"moving average of the policy from {name} on (rate {rate:g} every {period} steps)"

    def prepare(self, accelerator: Any) -> None:
        """Move it to the device.

        Raises:
            UserError: the policy is sharded.
        """
        plugin = accelerator.state.deepspeed_plugin if accelerator.distributed_type == "DEEPSPEED" else None
        if accelerator.is_fsdp2 or (plugin is not None and plugin.zero_stage == 3):
            raise UserError("reference: kind = ema needs the policy's weights whole; possible with it: one GPU, ddp, zero2")
        super().prepare(accelerator)

    @torch.no_grad()
    def follow(self, policy: nn.Module) -> None:
        """Take a step towards the policy, bare or wrapped by PEFT."""
        theirs = dict(causal_lm(policy).named_parameters())
        for name, ours in self.lm.named_parameters():
            ours.lerp_(theirs[name].detach().to(ours), self.rate)

    def save(self, folder: Path) -> None:
        """Write its weights."""
        save_file({name: one.detach().cpu().contiguous() for name, one in self.lm.named_parameters()}, folder / FILE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read what `save` wrote.

        Raises:
            UserError: there is none, or that of another model.
        """
        path, ours = folder / FILE, dict(self.lm.named_parameters())
        kept = load_file(path) if path.is_file() else {}
        if {name: one.shape for name, one in kept.items()} != {name: one.shape for name, one in ours.items()}:
            raise UserError(f"train.resume_from_checkpoint: {folder} does not hold the moving reference of this model ({FILE})")
        for name, one in ours.items():
            one.copy_(kept[name])


class Follows(TrainerCallback):
    """Moves the reference with the steps, and writes it into each checkpoint."""

    def __init__(self, trainer: Trainer, reference: MovingModel) -> None:
        self.trainer, self.reference = trainer, reference

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Every `period` steps."""
        if state.global_step % self.reference.period == 0:
            self.reference.follow(self.trainer.accelerator.unwrap_model(self.trainer.model))

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """It goes into the checkpoint."""
        if state.is_world_process_zero:
            self.reference.save(Path(args.output_dir, f"checkpoint-{state.global_step}"))
