"""Reward models and preference models: transformers that judge completions, each with its own tokenizer and template."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from accelerate import PartialState
from annotated_types import Ge
from peft import AutoPeftModelForSequenceClassification
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from ..conversations import Message, Text
from ..models import bf16_available, load_config, load_model, load_tokenizer, readable
from ..schema import NonNegativeInt, PositiveInt, UserError
from ..settings import ModelConfig
from .rules import said
from .scorer import Row

_log = logging.getLogger("posttrain")

CONTEST = "[CONTEXT] {context} [RESPONSE A] {a} [RESPONSE B] {b} \n"
"""What RLHFlow's pair-preference models were trained on."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """What every judging model is told."""

    model: str
    """Hub id or folder."""

    revision: str | None = None
    """Branch, tag or commit on the hub."""

    batch_size: PositiveInt = 16
    """Texts that are judged at a time."""

    max_length: Annotated[int, Ge(8)] = 2048
    """Tokens that it reads; of longer texts the beginning is left out, and how often is said."""

    trust_remote_code: bool = False
    """Run code that comes with the model."""

    @property
    def settings(self) -> ModelConfig:
        """How it is loaded."""
        return ModelConfig(name=self.model, revision=self.revision, trust_remote_code=self.trust_remote_code)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its own."""
        return load_tokenizer(self.settings)


@dataclass(frozen=True, kw_only=True)
class RewardModel(Judge):
    """The score of a sequence classification model: its one output, or the log-odds of one of its labels."""

    label: NonNegativeInt | None = None
    """Of several labels, the one whose log-odds are the score."""

    format: Literal["auto", "chat", "plain"] = "auto"
    """`chat` renders prompt and completion through the model's chat template, `plain` takes them as they stand; auto: chat
    where the prompt is messages and there is a template."""

    @cached_property
    def network(self) -> Any:
        """The model; of an adapter that posttrain reward exported, with its base.

        Raises:
            UserError: it cannot be loaded, or has several labels and none is chosen.
        """
        dtype = torch.bfloat16 if bf16_available() else torch.float32
        with readable("reward.model", self.model):
            if Path(self.model, "adapter_config.json").is_file():
                network = AutoPeftModelForSequenceClassification.from_pretrained(self.model, num_labels=1, dtype=dtype)
                network = network.merge_and_unload()
            else:
                network = AutoModelForSequenceClassification.from_pretrained(
                    self.model,
                    config=load_config(self.settings),
                    revision=self.revision,
                    dtype=dtype,
                    trust_remote_code=self.trust_remote_code,
                )
        labels = network.config.num_labels
        if (labels == 1) != (self.label is None) or (self.label or 0) >= labels:
            names = ", ".join(f"{number} ({name})" for number, name in network.config.id2label.items())
            raise UserError(
                f"reward.label = {self.label}: {self.model} has {labels} labels: {names}; choose one of several, none of one"
            )
        network.config.pad_token_id = self.tokenizer.pad_token_id  # decoders read the last token that is not this one
        return network.to(PartialState().device).eval().requires_grad_(False)

    def __call__(self, prompts: Sequence[Text], completions: Sequence[str], rows: Sequence[Row]) -> list[float]:
        """[rows] the scores."""
        ids = [self._ids(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
        return _in_batches(ids, self, self._score)

    def _ids(self, prompt: Text, completion: str) -> list[int]:
        chat = self.format == "chat" or (self.format == "auto" and not isinstance(prompt, str) and self.tokenizer.chat_template)
        if not chat:
            return self.tokenizer(said(prompt) + completion)["input_ids"]
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = self.tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": completion}], tokenize=False)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _score(self, ids: Tensor, mask: Tensor) -> Tensor:
        logits = self.network(input_ids=ids, attention_mask=mask).logits.float()  # [B, labels]
        if self.label is None:
            return logits[:, 0]
        others = [number for number in range(logits.shape[1]) if number != self.label]
        return logits[:, self.label] - logits[:, others].logsumexp(-1)


@dataclass(frozen=True, kw_only=True)
class PairPreference(Judge):
    """P(the first of two completions is better) by a causal LM that answers with one of two tokens.

    It reads the conversation and both completions, and the probability is softmax over its logits of the two tokens. Such
    models lean to one of the places, so `scorer.Preference` asks in both orders and takes the mean.
    """

    template: str = CONTEST
    """The user turn that it is asked with; {context}, {a} and {b} stand for the conversation and the completions."""

    answers: tuple[str, str] = ("A", "B")
    """The tokens for the first and the second completion."""

    generation_prompt: bool = False
    """End the question with the template's opening of an answer."""

    @cached_property
    def network(self) -> Any:
        """The model."""
        return load_model(self.settings, low_precision=True).to(PartialState().device).eval().requires_grad_(False)

    @cached_property
    def tokens(self) -> list[int]:
        """The ids of the answers.

        Raises:
            UserError: one is not a single token.
        """
        ids = [self.tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in self.answers]
        for answer, found in zip(self.answers, ids, strict=True):
            if len(found) != 1:
                raise UserError(f"preference.answers: {answer!r} is {len(found)} tokens of {self.model}; one is needed")
        return [found[0] for found in ids]

    def __call__(self, prompts: Sequence[Text], a: Sequence[str], b: Sequence[str]) -> list[float]:
        """[rows] the probabilities that a, shown first, is better."""
        ids = [self._ids(*one) for one in zip(prompts, a, b, strict=True)]
        return _in_batches(ids, self, self._first)

    def _ids(self, prompt: Text, a: str, b: str) -> list[int]:
        turns: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        context = "".join(f"\n\n<turn> {turn['role']}\n {turn['content']}" for turn in turns)
        parts = {"{context}": f"{context}\n\n\n", "{a}": a, "{b}": b}
        question = re.sub(r"\{context\}|\{a\}|\{b\}", lambda found: parts[found.group()], self.template)
        if not self.tokenizer.chat_template:
            return self.tokenizer(question)["input_ids"]
        asked = [{"role": "user", "content": question}]
        text = self.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=self.generation_prompt)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _first(self, ids: Tensor, mask: Tensor) -> Tensor:
        kept, at = (mask.sum(1) - 1).unique(return_inverse=True)  # last tokens; [B] which of them is whose
        logits = self.network(input_ids=ids, attention_mask=mask, logits_to_keep=kept).logits  # [B, kept, V]
        return logits[torch.arange(len(ids), device=ids.device), at][:, self.tokens].float().softmax(-1)[:, 0]


def _in_batches(texts: Sequence[list[int]], judge: Judge, score: Callable[[Tensor, Tensor], Tensor]) -> list[float]:
    """[texts] what `score(ids [B, T], mask [B, T])` says, texts of like length together and padded at the right."""
    long = sum(len(ids) > judge.max_length for ids in texts)
    if long:
        _log.info(
            "%s: %d of %d texts are longer than max_length = %d; read from their end",
            judge.model,
            long,
            len(texts),
            judge.max_length,
        )
    texts = [ids[-judge.max_length :] for ids in texts]
    out = [0.0] * len(texts)
    order = sorted(range(len(texts)), key=lambda at: len(texts[at]))
    device = PartialState().device
    for start in range(0, len(order), judge.batch_size):
        part = order[start : start + judge.batch_size]
        width = len(texts[part[-1]])
        padded = [texts[at] + [judge.tokenizer.pad_token_id] * (width - len(texts[at])) for at in part]
        mask = [[1] * len(texts[at]) + [0] * (width - len(texts[at])) for at in part]
        with torch.no_grad():
            values = score(torch.tensor(padded, device=device), torch.tensor(mask, device=device)).tolist()
        for at, value in zip(part, values, strict=True):
            out[at] = value
    return out
