"""What a run trains: a language model or, where its method scores completions, a model with one output."""

from __future__ import annotations

import dataclasses

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .models import load_model, load_policy, load_tokenizer
from .recipe import Run
from .scoring import load_scorer, load_scoring, pad_apart


def tokenizer_of(run: Run) -> PreTrainedTokenizerBase:
    """The tokenizer that a run reads its data with.

    Raises:
        UserError: there is none, or it cannot serve the method.
    """
    tokenizer = load_tokenizer(run.model)
    if run.objective.scores:
        pad_apart(tokenizer)
    return tokenizer


def model_of(run: Run, tokenizer: PreTrainedTokenizerBase, seed: int) -> nn.Module:
    """The model to train, fully or through an adapter that starts from a seed; statistics attached.

    Raises:
        UserError: it cannot be read or adapted, or cannot serve the method.
    """
    return load_scorer(run.model, tokenizer, seed) if run.objective.scores else load_policy(run.model, seed)


def base_of(run: Run, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model under the adapter of a run, as it was before."""
    plain = dataclasses.replace(run.model, peft=None)
    if run.objective.scores:
        return load_scoring(plain, tokenizer, low_precision=True)
    return load_model(plain, low_precision=True)
