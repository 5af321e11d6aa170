"""Load a policy and its tokenizer, and make a causal language model answer with per-token statistics instead of logits.

After `attach`, `model(..., statistics=Request(...))` runs the body, gathers the hidden states that predict completion tokens
and hands them to the output head, whose forward runs the vocabulary kernel. Both steps are forwards of the model's own
modules, so the hooks of DDP, DeepSpeed ZeRO-3, FSDP2 and PEFT fire as in any forward; without `statistics` nothing changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from posttrain_kernels import Head
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .inside import listening
from .schema import UserError
from .settings import ModelConfig
from .stats import Inside, Want
from .trees import attention
from .vocabulary import statistics as vocabulary_statistics

_SCALES = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
"""Configuration keys of a constant factor on the logits, with its exponent (Cohere, Falcon-H1; Granite divides)."""


@dataclass(frozen=True)
class Request:
    """What to say of the completion tokens of a batch."""

    gather: Tensor
    """[N] flat index into [R * T] of the position that predicts each token."""

    targets: Tensor
    """[N] the tokens."""

    want: tuple[Want, ...]
    """What the output head computes; empty: return the gathered hidden states under `hidden`."""

    inside: tuple[Inside, ...] = ()
    """What to read inside of the layers beside the hidden states, where `want` is empty."""

    refs: tuple[Head, ...] = ()
    """Second heads on the same tokens (a reference, or teachers), for divergences. The statistics beside each but the first
    have its number before their names: `1/forward_kl`."""

    lengths: Tensor | None = None
    """[B] tokens of each completion: the objective's own module (learned.py) adds its statistics."""

    given: Mapping[str, Tensor] = field(default_factory=dict)
    """What is known beside what the head computes: read by that module, and `top_ids` [N, K] by a Top without a second head."""

    temperature: float = 1.0
    """Divides the logits of the output head."""

    impl: str = "auto"
    """Implementation of the kernel."""


def attach(model: nn.Module) -> None:
    """Teach a causal LM (bare or wrapped by PEFT) to accept `statistics=Request`; it then returns a dict of [N] tensors."""
    lm = causal_lm(model)
    plain = lm.forward

    def forward(self: PreTrainedModel, *args: Any, statistics: Request | None = None, **kwargs: Any) -> Any:
        if statistics is None:
            return plain(*args, **kwargs)
        with listening(self, statistics.gather, statistics.inside) as heard:
            hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state  # [R, T, H]
        x = hidden.flatten(0, 1).index_select(0, statistics.gather)  # [N, H]
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if not statistics.want:
            return {"hidden": x, **heard(x)}
        answer = self.get_output_embeddings()(x, statistics=statistics)
        if statistics.lengths is None:
            return answer
        for number, said in enumerate(by_reference({**statistics.given, **answer}, len(statistics.refs))):
            answer |= _numbered(self.objective({"hidden": x, **said}, statistics.lengths), number)
        return answer

    lm.forward = MethodType(forward, lm)
    for head in _head_modules(lm):
        _attach_head(head, lm)


def _attach_head(head: nn.Module, lm: PreTrainedModel) -> None:
    plain = head.forward

    def forward(self: nn.Module, x: Tensor, *args: Any, statistics: Request | None = None, **kwargs: Any) -> Any:
        if statistics is None:
            return plain(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            mine = replace(_head(self, lm, x), temperature=statistics.temperature)
            found: dict[str, Tensor] = {}
            for number, ref in enumerate(statistics.refs or (None,)):
                index = statistics.given.get("top_ids")
                answer = vocabulary_statistics(
                    mine, statistics.want, targets=statistics.targets, ref=ref, index=index, impl=statistics.impl
                )
                found |= _numbered(answer, number)
            return found

    head.forward = MethodType(forward, head)


def _numbered(answer: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """Statistics beside the second head of this number, as `by_reference` tells them apart."""
    return {f"{number}/{name}" if number else name: values for name, values in answer.items()}


def by_reference(answer: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """The statistics beside each of `count` second heads (`Request.refs`), those of the first without a number."""
    numbered = [{} for _ in range(max(count, 1))]
    for name, values in answer.items():
        number, slash, rest = name.partition("/")
        own = slash and number.isdigit()
        numbered[int(number) if own else 0][rest if own else name] = values
    return numbered


def model_inputs(model: nn.Module, batch: dict[str, Tensor], layout: str) -> dict[str, Any]:
    """The arguments with which a model reads the rows of a batch laid out by `layout`."""
    mask = attention(causal_lm(model).config, batch["tree"], batch["branch"], batch["position_ids"], layout)
    return {"input_ids": batch["input_ids"], **mask}


def head_of(model: nn.Module, x: Tensor) -> Head:
    """The output head of a causal LM as it is now (adapters on or off) on gathered hidden states x [N, H]."""
    lm = causal_lm(model)
    module = lm.get_output_embeddings()
    for candidate in _head_modules(lm):
        if candidate is module:
            return _head(module, lm, x)
    # PEFT's modules_to_save: a trained copy while the adapter is on, the original while it is off.
    original, *saved = _head_modules(lm)
    return _head(original if module.disable_adapters else saved[0], lm, x)


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model if isinstance(model, PreTrainedModel) else model.get_base_model()


def _head_modules(lm: PreTrainedModel) -> list[nn.Module]:
    """The modules that own an output head: one, or the original and its trained copies under PEFT's modules_to_save."""
    module = lm.get_output_embeddings()
    if module is None:
        raise UserError(
            f"model: {type(lm).__name__} has no output head (get_output_embeddings); a causal language model is needed"
        )
    return owners(module)


def owners(module: nn.Module) -> list[nn.Module]:
    """The modules behind one that PEFT may have wrapped: itself, or the original and its trained copies (modules_to_save)."""
    children = dict(module.named_children())
    if "modules_to_save" in children:
        return [children["original_module"], *children["modules_to_save"].values()]
    return [module]


def _head(module: nn.Module, lm: PreTrainedModel, x: Tensor) -> Head:
    text = lm.config.get_text_config().to_dict()
    scale = 1.0
    for key, power in _SCALES.items():
        if text.get(key) is not None:
            scale *= float(text[key]) ** power
    base, extra = module, []
    children = dict(module.named_children())
    if "base_layer" in children:  # a LoRA layer of PEFT
        base = children["base_layer"]
        if not module.disable_adapters and not module.merged:
            for name in module.active_adapters:
                if module.use_dora[name]:
                    raise UserError("model.peft: DoRA on the output head is not supported; leave lm_head out of target_modules")
                down, up = module.lora_A[name], module.lora_B[name]
                extra.append((down(module.lora_dropout[name](x).to(down.weight.dtype)) * module.scaling[name], up.weight))
    return Head(
        x=x,
        weight=base.weight,
        extra=tuple(extra),
        bias=base.bias if isinstance(base, nn.Linear) else None,
        scale=scale,
        softcap=text.get("final_logit_softcapping"),
    )


def load_tokenizer(settings: ModelConfig, where: str = "model") -> PreTrainedTokenizerBase:
    """The tokenizer of a model (or the one that `tokenizer` names), with the chat template that `chat_template` gives.

    Args:
        settings: which model.
        where: the section of the recipe, for errors; so too below.

    Raises:
        UserError: no such folder or hub repository, or one without a tokenizer.
    """
    name = settings.tokenizer or settings.name
    with readable(f"{where}.{'tokenizer' if settings.tokenizer else 'name'}", name):
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    if settings.chat_template:
        path = Path(settings.chat_template)
        is_file = "{" not in settings.chat_template and path.exists()
        tokenizer.chat_template = path.read_text() if is_file else settings.chat_template
    if tokenizer.eos_token_id is None:
        raise UserError(f"{where}.tokenizer: {name} has no end-of-sequence token; a completion could not end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(settings: ModelConfig, where: str = "model") -> Any:
    """The configuration of a model, without weights; dropout off unless asked for.

    Raises:
        UserError: no such folder or hub repository, or not a causal language model.
    """
    with readable(f"{where}.name", settings.name):
        config = AutoConfig.from_pretrained(
            settings.name, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    if not settings.dropout:
        text = config.get_text_config()
        for key, value in text.to_dict().items():
            if key.endswith(("dropout", "pdrop")) and isinstance(value, float):
                setattr(text, key, 0.0)
    return config


def load_model(settings: ModelConfig, *, low_precision: bool = False, where: str = "model") -> PreTrainedModel:
    """A causal LM with its statistics attached, adapters not yet added.

    Args:
        settings: which model; `dtype: auto` is float32 (master weights of a full fine-tuning).
        low_precision: the weights will not be trained: `dtype: auto` is then bfloat16 where the device computes in it.

    Raises:
        UserError: no such folder or hub repository, or not a causal language model.
    """
    config = load_config(settings, where)
    return read_weights(AutoModelForCausalLM, settings, config, low_precision=low_precision, where=where)[0]


def read_weights(
    kind: Any, settings: ModelConfig, config: Any, *, low_precision: bool, where: str = "model"
) -> tuple[PreTrainedModel, list[str]]:
    """A model of a kind (an Auto class of transformers), else as `load_model`, and the parameters that it was not given.

    Args:
        config: the model's configuration, as it is to be.

    Raises:
        UserError: as `load_model`.
    """
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "bfloat16" if low_precision and bf16_available() else "float32"
    attention = settings.attention
    if attention is None and config.get_text_config().to_dict().get("attn_logit_softcapping"):
        attention = "eager"  # sdpa leaves the soft-cap of the attention scores out without a word
    if attention == "flex_attention" and not torch.cuda.is_available():
        attention = "sdpa"  # the same numbers; elsewhere flex_attention has no gradient
    progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with readable(f"{where}.name", settings.name):
            model, found = kind.from_pretrained(
                settings.name,
                config=config,
                revision=settings.revision,
                dtype=getattr(torch, dtype),
                attn_implementation=attention,
                trust_remote_code=settings.trust_remote_code,
                output_loading_info=True,
            )
    finally:
        if progress:
            logging.enable_progress_bar()
    model.config.use_cache = False
    return model, sorted(found["missing_keys"])


def load_policy(settings: ModelConfig, seed: int) -> nn.Module:
    """The model to train: fully, or through the adapter that `settings.peft` describes; statistics attached.

    Args:
        settings: which model.
        seed: of what a new adapter starts from.

    Raises:
        UserError: as `load_model`; or peft settings that PEFT refuses.
    """
    model: nn.Module = load_model(settings, low_precision=settings.peft is not None)
    if settings.peft is not None:
        model = add_adapter(model, settings.peft, seed)
    attach(model)
    return model


def add_adapter(model: PreTrainedModel, values: dict[str, Any], seed: int, task: str = "CAUSAL_LM") -> nn.Module:
    """A model under a new PEFT adapter for a task of PEFT's, the same for the same seed, whatever was drawn before: loading
    takes random numbers, and others where ZeRO-3 cuts the weights.

    Raises:
        UserError: settings that PEFT refuses.
    """
    from peft import get_peft_config, get_peft_model

    try:
        config = get_peft_config({"peft_type": "LORA", "task_type": task, "target_modules": "all-linear", **values})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return get_peft_model(model, config)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"model.peft: {' '.join(str(error).split())}") from None


def bf16_available() -> bool:
    """Whether there is an accelerator that computes in bfloat16."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Number of parameters: all, trainable. Partitioned (ZeRO-3) ones are counted whole."""
    sizes = [(p.ds_numel if "ds_numel" in vars(p) else p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trainable in sizes if trainable)


def dtypes(parameters: Sequence[Tensor]) -> str:
    """The dtypes that occur, as in `float32` or `bfloat16, float32`."""
    return ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))


@contextlib.contextmanager
def readable(where: str, name: str) -> Iterator[None]:
    """Turn the many ways in which a folder or a hub repository cannot be read into one line.

    Raises:
        UserError: that line.
    """
    if Path(name).is_absolute() or name.startswith((".", "~")):
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise UserError(f"{where}: folder {name} does not exist; give a model folder or a hub id such as Qwen/Qwen3-0.6B")
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{where}: {name} cannot be loaded; give a model folder or a hub id. {reason}") from None


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)
