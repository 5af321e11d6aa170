"""Models that score: a decoder with one output in place of a vocabulary, `AutoModelForSequenceClassification` with one label.

Such a model is read at the last token of a text that is not padding, by whoever loads it. So the padding has to be a token that
ends no text. After `attach_scores`, `model(..., statistics=Request(...))` gives the score at each place that the request
gathers, as models.attach has it for log-probs; without `statistics` nothing changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .models import Request, add_adapter, causal_lm, load_config, owners, read_weights
from .schema import UserError
from .settings import ModelConfig
from .stats import wide


def pad_apart(tokenizer: PreTrainedTokenizerBase, where: str = "model.tokenizer") -> None:
    """Give a tokenizer that pads with its end token another padding, one that it has and that ends no text.

    Raises:
        UserError: it has none, and a chat template, whose texts may end with the end token.
    """
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    others = [token for token in (tokenizer.unk_token, tokenizer.bos_token) if token not in (None, tokenizer.eos_token)]
    if others:
        tokenizer.pad_token = others[0]
    elif tokenizer.chat_template:
        raise UserError(
            f"{where}: it pads with {tokenizer.eos_token}, which ends its texts, and a model that scores is read at the last "
            "token that is not padding; give a tokenizer with a pad_token of its own"
        )


def scorer_config(settings: ModelConfig) -> Any:
    """The configuration of a model as one that scores.

    Raises:
        UserError: it cannot be read, or is a classifier with several labels.
    """
    config = load_config(settings)
    classifies = any("SequenceClassification" in name for name in config.architectures or ())
    if classifies and config.num_labels != 1:
        raise UserError(f"model.name: {settings.name} has {config.num_labels} labels; a language model or one label is needed")
    config.num_labels = 1
    return config


def load_scoring(settings: ModelConfig, tokenizer: PreTrainedTokenizerBase, *, low_precision: bool = False) -> PreTrainedModel:
    """A language model with a new output, which is 0, or a reward model with its own; adapters not yet added.

    Args:
        settings: which model.
        tokenizer: its tokenizer, padding apart.
        low_precision: as in models.load_model.

    Raises:
        UserError: it cannot be read, or is not a decoder that is read at its last token.
    """
    config = scorer_config(settings)
    with _without_a_word():  # of the vocabulary's head, which is left out, and of the new output
        model, missing = read_weights(AutoModelForSequenceClassification, settings, config, low_precision=low_precision)
    if not isinstance(dict(model.named_children()).get("score"), nn.Linear):
        raise UserError(
            f"model.name: {type(model).__name__} has no output `score` at the last token of a text; a decoder is needed"
        )
    if any(key.startswith("score.") for key in missing):
        for parameter in model.score.parameters():
            nn.init.zeros_(parameter)
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    return model


def load_scorer(settings: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> nn.Module:
    """The model to train: fully, or through an adapter, which starts from a seed, and its output; statistics attached.

    Raises:
        UserError: as `load_scoring`; or peft settings that PEFT refuses.
    """
    model: nn.Module = load_scoring(settings, tokenizer, low_precision=settings.peft is not None)
    if settings.peft is not None:
        model = add_adapter(model, settings.peft, seed, "SEQ_CLS")
    attach_scores(model)
    return model


def attach_scores(model: nn.Module) -> None:
    """Teach a model that scores (bare or wrapped by PEFT) to accept `statistics=Request`: it returns `score` [N], in float32 or
    better, or, where nothing is wanted, `hidden` [N, H].

    Raises:
        UserError: a low-rank adapter on its output.
    """
    lm = causal_lm(model)
    plain = lm.forward

    def forward(self: PreTrainedModel, *args: Any, statistics: Request | None = None, **kwargs: Any) -> Any:
        if statistics is None:
            return plain(*args, **kwargs)
        hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state  # [R, T, H]
        x = hidden.flatten(0, 1).index_select(0, statistics.gather)  # [N, H]
        return {"score": self.score(x, statistics=statistics)} if statistics.want else {"hidden": x}

    lm.forward = MethodType(forward, lm)
    for head in owners(lm.score):
        if type(head) is not nn.Linear:
            raise UserError("model.peft: leave score out of target_modules; the output of the model is trained whole")
        _attach_output(head)


def _attach_output(head: nn.Linear) -> None:
    plain = head.forward

    def forward(self: nn.Linear, x: Tensor, *args: Any, statistics: Request | None = None, **kwargs: Any) -> Tensor:
        if statistics is None:
            return plain(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else wide(self.bias)
            return nn.functional.linear(wide(x), wide(self.weight), bias).squeeze(-1)  # [N]

    head.forward = MethodType(forward, head)


@contextlib.contextmanager
def _without_a_word() -> Iterator[None]:
    """No warnings of transformers for a while."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
