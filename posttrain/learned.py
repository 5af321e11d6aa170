"""Parameters of an objective's own: a module of the policy, in its optimizer, and beside its weights in every checkpoint.

The module runs inside the policy's forward (models.attach), so that the hooks of DDP, DeepSpeed ZeRO and FSDP2 fire as for
any other of its modules. The exported model and the weights in a checkpoint do not hold it; `objective.safetensors` does,
except in a checkpoint of DeepSpeed, whose own files hold all that is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback, TrainingArguments

from .models import causal_lm, parameter_counts
from .registry import Objective
from .schema import UserError
from .stats import Completions, Learned, Sizes

NAME = "objective"
"""Of the module in the policy; models.attach calls it."""

FILE = "objective.safetensors"
"""Beside the weights in a checkpoint."""


class Own(nn.Module):
    """Parameters of an objective's own and what they say of each token."""

    def __init__(self, learned: Learned, config: Any, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.learned, self.config = learned, config
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, statistics: dict[str, Tensor], lengths: Tensor) -> dict[str, Tensor]:
        """Statistics of N tokens, by the kernel's names, of completions of these lengths [B] -> further ones, by name."""
        more = dict(statistics)
        logps, reference_logps = more.pop("logp"), more.pop("ref_logp", None)
        completions = Completions(logps=logps, lengths=lengths, reference_logps=reference_logps, more=more)
        # In float32 or better, also where DeepSpeed keeps them in 16 bits beside its master weights.
        wide = {name: p.to(torch.promote_types(p.dtype, torch.float32)) for name, p in self.named_parameters()}
        with torch.autocast(lengths.device.type, enabled=False):
            return dict(self.learned.statistics(self.config, wide, completions))


def add(model: nn.Module, objective: Objective, config: Any, reference: Any, seed: int) -> Own | None:
    """Give the policy the module of an objective, the same on every process; None where the objective has none.

    Args:
        model: the policy, bare or wrapped by PEFT.
        reference: the configuration of the reference model; that of the policy where there is none.
        seed: of the values that the parameters start from.
    """
    if objective.learned is None:
        return None
    lm = causal_lm(model)
    text, theirs = lm.config.get_text_config(), reference.get_text_config()
    sizes = Sizes(
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        reference_hidden=theirs.hidden_size,
        reference_layers=theirs.num_hidden_layers,
    )
    dtype = torch.promote_types(next(lm.parameters()).dtype, torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        values = {name: value.to(dtype) for name, value in objective.learned.start(config, sizes).items()}
    if not values:
        return None
    own = Own(objective.learned, config, values)
    lm.add_module(NAME, own)
    lm._keys_to_ignore_on_save = {*(lm._keys_to_ignore_on_save or ()), *(f"{NAME}.{name}" for name in values)}
    return own


def optimise_apart(optimizer: torch.optim.Optimizer, own: Own, default: float) -> None:
    """Move the module's parameters into a group of their own, with the objective's learning rate (or `default`) and decay."""
    parameters = list(own.parameters())
    mine = {id(parameter) for parameter in parameters}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in mine]
    rate, decay = rates(own, default)
    optimizer.add_param_group({"params": parameters, "lr": rate, "weight_decay": decay})


def describe(own: Own, default: float) -> str:
    """How many there are and how they are trained; `default` is the run's learning rate."""
    rate, decay = rates(own, default)
    return f"{parameter_counts(own)[0]:,} parameters of the objective, learning rate {rate:g}, weight decay {decay:g}"


def rates(own: Own, default: float) -> tuple[float, float]:
    """Learning rate and weight decay of the module; `default` is the run's learning rate."""
    rate = own.learned.learning_rate(own.config)
    return default if rate is None else rate, own.learned.weight_decay(own.config)


def save(own: Own, folder: Path, *, write: bool) -> None:
    """Write the parameters, whole; every process calls it, one with `write`."""
    whole = {name: _whole(parameter.detach()) for name, parameter in own.named_parameters()}
    if write:
        save_file({name: value.cpu().contiguous() for name, value in whole.items()}, folder / FILE)


def load(own: Own, folder: Path) -> None:
    """Read the parameters that `save` wrote, in place.

    Raises:
        UserError: the folder has none, or others.
    """
    path = folder / FILE
    if not path.is_file():
        raise UserError(f"train.resume_from_checkpoint: {folder} has no {FILE}, which holds the objective's own parameters")
    values = load_file(path)
    expected = {name: parameter.shape for name, parameter in own.named_parameters()}
    if {name: value.shape for name, value in values.items()} != expected:
        raise UserError(f"train.resume_from_checkpoint: {path} holds parameters of another objective or model")
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            parameter.copy_(_like(values[name], parameter))


def _whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, cut as a parameter is that FSDP2 shards."""
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


class Kept(TrainerCallback):
    """Writes the module into each checkpoint, and takes it from the best one where the run ends with that."""

    def __init__(self, own: Own) -> None:
        self.own = own

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """The module goes into the checkpoint."""
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        save(self.own, folder, write=state.is_world_process_zero)

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """The policy is that of the best checkpoint now (train.load_best_model_at_end)."""
        if args.load_best_model_at_end and state.best_model_checkpoint:
            load(self.own, Path(state.best_model_checkpoint))
