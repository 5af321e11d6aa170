"""Rollouts from the training model itself, by transformers' `generate`: no second copy of the weights, nothing to bring over.

Every completion has its own stream of random numbers, and a token is drawn by inverting the cumulative distribution at the
stream's next number. So a completion depends on its seed and not on what is sampled beside it, on micro-batches or processes
(up to the rounding of batched logits), and the generators of torch, which training resumes from, are never touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..models import causal_lm, evaluating
from ..schema import UserError
from ..settings import SamplingConfig
from .rollout import Rollout, cut, refuse_prompts, seeds_for
from .stop import Stop


class HFEngine:
    """Samples from a model that lives in this process, usually the one that is trained.

    Args:
        model: a causal LM: bare, under PEFT (sampled with its adapter on), in DDP's wrapper, or in DeepSpeed's engine. Under
            ZeRO-3 all processes have to generate at the same time: the weights are gathered once a call.
        sampling: the settings.
        ends: tokens that end a completion.
        pad: token that fills rows up; it is never read.
        batch_size: completions that are sampled at a time.
        compute: context to sample in, such as the trainer's autocast (`Trainer.compute_loss_context_manager`), so that both
            compute alike.
        tokenizer: of the model, for `sampling.stop`.
    """

    def __init__(
        self,
        model: nn.Module,
        sampling: SamplingConfig,
        *,
        ends: Sequence[int],
        pad: int,
        batch_size: int = 32,
        compute: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.model, self.sampling, self.ends, self.pad = model, sampling, tuple(ends), pad
        self.stop = Stop(sampling.stop or (), tokenizer)
        self.batch_size, self.compute = batch_size, compute
        self.version = 0

    def generate(self, prompts: Sequence[Sequence[int]], n: int = 1, *, seeds: Sequence[int] | None = None) -> list[Rollout]:
        """n rollouts of each prompt, prompt after prompt; see `Engine.generate`."""
        refuse_prompts(prompts, self.sampling, _positions(causal_lm(extract_model_from_parallel(self.model))), "engine hf")
        seeds = seeds_for(self.sampling, self.version, prompts, seeds)
        wanted = [(group, sample) for group in range(len(prompts)) for sample in range(n)]
        order = sorted(wanted, key=lambda one: len(prompts[one[0]]), reverse=True)  # the largest first: what fits, fits early
        done: dict[tuple[int, int], Rollout] = {}
        with whole(self.model) as lm, _generating(lm, self._settings()), self.compute():
            for start in range(0, len(order), self.batch_size):
                part = order[start : start + self.batch_size]
                tokens, logps = self._sample(lm, [prompts[g] for g, _ in part], [(seeds[g], sample) for g, sample in part])
                for (group, sample), ids, values in zip(part, tokens, logps, strict=True):
                    ids, finished = cut(ids, self.ends if self.sampling.stop_at_eos else ())
                    one = Rollout(list(prompts[group]), ids, values[: len(ids)], finished, group, self.version)
                    done[group, sample] = self.stop.cut(one)
        return [done[one] for one in wanted]

    def sync(self, version: int) -> None:
        """Stamp what follows with `version`: the weights are the model's own and always in."""
        self.version = version

    def close(self) -> None:
        """Nothing: the model is its owner's."""

    def _settings(self) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=self.sampling.max_new_tokens,
            eos_token_id=list(self.ends) if self.sampling.stop_at_eos else None,
            pad_token_id=self.pad,
            do_sample=False,  # _Draw leaves one token to choose
            use_cache=True,
        )

    def _sample(
        self, lm: PreTrainedModel, prompts: Sequence[Sequence[int]], streams: Sequence[tuple[int, int]]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Ids and log-probs of one completion per prompt, up to the length of the longest."""
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=lm.device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=lm.device)
        draw = _Draw(self.sampling, streams, lm.device)
        out = lm.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=lm.generation_config,
            logits_processor=LogitsProcessorList([*_warpers(self.sampling), draw]),
            stopping_criteria=StoppingCriteriaList([_Ended(self.stop, prompts, width)] if self.stop.strings else []),
            synced_gpus=False,  # all weights are here: no process waits for another
        )
        tokens = out[:, width:]
        return tokens.tolist(), torch.stack(draw.logps, 1)[:, : tokens.shape[1]].tolist()


class _Draw(LogitsProcessor):
    """Draws the next token of every row, keeps its log-prob, and leaves `generate` no other token to choose.

    It comes last. Keeping one number per row and step takes the place of `output_scores`, which keeps all logits of all steps.
    """

    def __init__(self, sampling: SamplingConfig, streams: Sequence[tuple[int, int]], device: torch.device) -> None:
        self.greedy = sampling.temperature == 0
        self.logps: list[Tensor] = []
        if not self.greedy:
            numbers = [np.random.default_rng(stream).random(sampling.max_new_tokens) for stream in streams]
            self.uniform = torch.tensor(np.array(numbers), device=device)  # [B, T] float64

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logps = scores.log_softmax(-1)  # [B, V] float32
        token = logps.argmax(-1, keepdim=True) if self.greedy else self._invert(logps, self.uniform[:, [len(self.logps)]])
        self.logps.append(logps.gather(-1, token).squeeze(-1))
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)

    @staticmethod
    def _invert(logps: Tensor, uniform: Tensor) -> Tensor:
        """[B, V], [B, 1] in [0, 1) -> [B, 1] the first token at which the cumulative probability exceeds the number.

        In float64: float32 sums over a vocabulary would shift the tail by more than its smallest probabilities.
        """
        cumulative = logps.double().exp().cumsum(-1)
        total = cumulative[:, -1:]
        at = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))  # below the total, or none exceeds
        return torch.searchsorted(cumulative, at, right=True)


class _Ended(StoppingCriteria):
    """Ends the rows whose text has come to a stop string; that of transformers also finds one that begins in the prompt.

    Args:
        stop: the strings.
        prompts: of the rows.
        width: tokens of the padded prompts.
    """

    def __init__(self, stop: Stop, prompts: Sequence[Sequence[int]], width: int) -> None:
        self.stop, self.prompts, self.width = stop, prompts, width
        self.ended = [False] * len(prompts)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        rows = zip(self.ended, self.prompts, input_ids[:, self.width :].tolist(), strict=True)
        self.ended = [ended or self.stop.reached(prompt, tokens) for ended, prompt, tokens in rows]
        return torch.tensor(self.ended, device=input_ids.device)  # [B]


def _warpers(sampling: SamplingConfig) -> list[LogitsProcessor]:
    """Temperature and truncation, in the order of transformers; none of it changes the likeliest token."""
    if sampling.temperature == 0:
        return []
    found: list[LogitsProcessor] = []
    if sampling.temperature != 1:
        found.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        found.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        found.append(MinPLogitsWarper(sampling.min_p))
    return found


def _positions(lm: PreTrainedModel) -> int | None:
    """Tokens that the model can read; None where it has no limit."""
    text = lm.config.get_text_config().to_dict()
    return text.get("max_position_embeddings") or text.get("n_positions")


@contextlib.contextmanager
def whole(model: nn.Module) -> Iterator[PreTrainedModel]:
    """The transformers model inside its wrappers, with all of its weights on this device: ZeRO-3's are gathered for a while.

    Raises:
        UserError: FSDP has sharded it.
    """
    lm = causal_lm(extract_model_from_parallel(model))
    if isinstance(lm, FSDPModule):
        raise UserError(
            "engine hf: the model is sharded by FSDP; possible: one GPU, --launch ddp, zero2 or zero3, or engine vllm"
        )
    if not any("ds_id" in vars(parameter) for parameter in lm.parameters()):
        yield lm
        return
    from deepspeed.runtime.zero import unwrap_model_for_generation

    with unwrap_model_for_generation(model):
        yield lm


@contextlib.contextmanager
def _generating(lm: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Evaluation mode, with `settings` alone in force and the forward that the model came with.

    `generate` fills every setting that is unset from the model's generation_config, which on the hub often names a repetition
    penalty or a top_k. And it reads from the signature of `forward` whether positions are to be made for padded rows; the
    forward that answers with statistics hides that signature.
    """
    theirs, taught = lm.generation_config, vars(lm).pop("forward", None)
    lm.generation_config = settings
    try:
        with evaluating(lm), torch.no_grad():
            yield
    finally:
        lm.generation_config = theirs
        if taught is not None:
            lm.forward = taught
