"""The policy's weights as a folder that other programs read: safetensors, adapters merged, the policy left as it is."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from accelerate import PartialState
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from .hf import whole


def write(model: nn.Module, folder: Path) -> None:
    """Write a causal LM's weights and configuration into `folder`; of several processes all call it, the first writes.

    Args:
        model: as `hf.HFEngine` takes it; an adapter that is on is merged in what is written, layer by layer in copies.
        folder: made if it is not there; what it holds of an earlier version is replaced.
    """
    state = PartialState()
    with whole(model) as lm:
        if state.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            lm.save_pretrained(folder, state_dict=merged(lm))
    state.wait_for_everyone()


def merged(lm: PreTrainedModel) -> dict[str, Tensor]:
    """Name -> weight of the model without PEFT that computes the same as `lm` with its adapter on."""
    tuned = {name: module for name, module in lm.named_modules() if isinstance(module, BaseTunerLayer)}
    saved = {name: module for name, module in lm.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    inside = tuple(f"{name}." for name in (*tuned, *saved))
    state = {name: tensor for name, tensor in lm.state_dict().items() if not name.startswith(inside)}
    with torch.no_grad():
        for name, module in tuned.items():
            once = copy.deepcopy(module)
            once.merge()
            state |= {f"{name}.{key}": tensor for key, tensor in once.get_base_layer().state_dict().items()}
    for name, module in saved.items():
        trained = module.modules_to_save[module.active_adapters[0]]
        state |= {f"{name}.{key}": tensor for key, tensor in trained.state_dict().items()}
    return state
