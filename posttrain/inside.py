"""What passes through the layers of a causal language model at the completion tokens, gathered as it goes.

Forward hooks on the decoder layers keep only what is asked for of the N tokens, so that no [rows, tokens, layers, width] tensor
is ever held and nothing of prompts is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .schema import UserError
from .stats import Activations, Inside, States

_CHILDREN = {
    "attention": ("self_attn", "attn", "attention", "self_attention"),
    "mlp": ("mlp", "feed_forward", "ffn", "block_sparse_moe"),
}
"""What a layer calls its attention and its MLP, over the architectures of transformers."""

_STATES = "reference_states"


def name(of: str) -> str:
    """Of the statistic `Activations(of=...)`."""
    return f"reference_{of}"


@contextlib.contextmanager
def listening(lm: PreTrainedModel, gather: Tensor, want: Sequence[Inside]) -> Iterator[Callable[[Tensor], dict[str, Tensor]]]:
    """Listen to one forward of the model's body.

    Args:
        gather: [N] flat index into [R * T] of the positions to keep.

    Yields:
        To be called after the forward with its last hidden states at those positions [N, H]: the statistics by name. Those of
        the logits are the output head's (vocabulary.mean_logits).

    Raises:
        UserError: the layers, or what is asked for of them, cannot be found.
    """
    heard: dict[str, list[Tensor]] = {}
    with contextlib.ExitStack() as hooks:
        for key, modules, keep in _places(lm, want):
            heard[key] = []
            for module in modules:
                handle = module.register_forward_hook(_hook(heard[key], gather, keep))
                hooks.callback(handle.remove)

        def statistics(last: Tensor) -> dict[str, Tensor]:
            if _STATES in heard:
                heard[_STATES].append(last)
            return {key: torch.stack(values, 1) for key, values in heard.items()}

        yield statistics


def refuse_unknown(lm: PreTrainedModel, want: Sequence[Inside]) -> None:
    """Look for what is asked for before training.

    Raises:
        UserError: as `listening`.
    """
    _places(lm, want)


def _places(lm: PreTrainedModel, want: Sequence[Inside]) -> list[tuple[str, list[nn.Module], Callable[[Tensor], Tensor]]]:
    """(name of the statistic, modules to listen to, what to keep of the output of each) of what is asked for."""
    found = []
    for entry in want:
        match entry:
            case States():
                found.append((_STATES, _layers(lm)[:-1], lambda x: x))
            case Activations(of="residual"):
                found.append((name(entry.of), _layers(lm), _feature_mean))
            case Activations(of="attention" | "mlp"):
                found.append((name(entry.of), [_child(lm, layer, entry.of) for layer in _layers(lm)], _feature_mean))
    return found


def _feature_mean(x: Tensor) -> Tensor:
    """[N, H] -> [N]"""
    return x.mean(-1, dtype=torch.promote_types(x.dtype, torch.float32))


def _hook(kept: list[Tensor], gather: Tensor, keep: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output  # [R, T, H]
        kept.append(keep(hidden.detach().reshape(-1, hidden.shape[-1]).index_select(0, gather)))

    return hook


def _layers(lm: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers: the outermost list of as many modules as the configuration has layers."""
    count = lm.config.get_text_config().num_hidden_layers
    for module in lm.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise UserError(f"reference: {type(lm).__name__} has no list of its {count} decoder layers, whose states are read")


def _child(lm: PreTrainedModel, layer: nn.Module, of: str) -> nn.Module:
    children = dict(layer.named_children())
    for candidate in _CHILDREN[of]:
        if candidate in children:
            return children[candidate]
    parts = ", ".join(children)
    raise UserError(f"reference: a layer of {type(lm).__name__} has no {of}, whose activations are read; its parts: {parts}")
