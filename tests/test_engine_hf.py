"""Rollouts from the training model: what is sampled, with which log-probs, and what is left untouched."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny
from torch import nn
from torch.distributed import HashStore
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import GenerationConfig

from posttrain.engines.hf import HFEngine, _Draw, whole
from posttrain.engines.rollout import Rollout, cut, derived, probe, truncation_warning
from posttrain.models import Request, attach, causal_lm, model_inputs
from posttrain.schema import UserError, parse
from posttrain.settings import SamplingConfig
from posttrain.trees import TreeCollator

EOS, PAD = 2, 0
PROMPTS = [[1, 5, 9, 14, 33, 7, 20], [1, 40], [1, 12, 13, 14]]
"""Of different lengths: all but the first are padded."""


def engine(model: nn.Module, *, ends: Sequence[int] = (EOS,), batch_size: int = 32, **settings: object) -> HFEngine:
    sampling = SamplingConfig(**{"max_new_tokens": 12, **settings})
    return HFEngine(model, sampling, ends=ends, pad=PAD, batch_size=batch_size)


def trained(name: str = "llama", **settings: object) -> nn.Module:
    """A tiny model as the trainer has it: it answers with statistics, and is in training mode."""
    model = tiny(name, **settings)
    attach(model)
    return model.train()


def trainer_logps(model: nn.Module, rollouts: Sequence[Rollout]) -> list[float]:
    """What the trainer's forward says of the same tokens."""
    rows = [{"prompt": one.prompt, "completion": [one.completion]} for one in rollouts]
    batch = TreeCollator(roles=("completion",), layout="separate")(rows)
    request = Request(gather=batch["gather"], targets=batch["targets"], want=("logp",))
    with torch.no_grad():
        return model(**model_inputs(model, batch, "separate"), statistics=request)["logp"].tolist()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "mistral", "gpt2", "opt"])
def test_log_probs_are_those_of_the_trainer(name: str) -> None:
    model = trained(name)
    rollouts = engine(model).generate(PROMPTS, 3)
    assert [(one.group, one.prompt) for one in rollouts] == [(g, PROMPTS[g]) for g in (0, 0, 0, 1, 1, 1, 2, 2, 2)]
    assert len({tuple(one.completion) for one in rollouts}) > 5
    ours = [logp for one in rollouts for logp in one.logps]
    assert [len(one.logps) for one in rollouts] == [len(one.completion) for one in rollouts]
    assert max(abs(a - b) for a, b in zip(ours, trainer_logps(model, rollouts), strict=True)) < 1e-5


def test_tokens_come_as_often_as_the_model_says() -> None:
    """4,000 first tokens against the model's distribution: total variation within what chance makes of it."""
    model = tiny("llama", initializer_range=0.5)
    with torch.no_grad():
        p = model(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1)
    rollouts = engine(model, max_new_tokens=1, batch_size=1000).generate(PROMPTS[:1], 4000)
    seen = Counter(one.completion[0] for one in rollouts)
    q = torch.tensor([seen[token] / 4000 for token in range(len(p))])
    by_chance = float((p * (1 - p) / 4000).sqrt().sum() / 2)
    assert (p - q).abs().sum() / 2 < 1.3 * by_chance
    assert all(one.logps[0] == pytest.approx(float(p[one.completion[0]].log()), abs=1e-5) for one in rollouts)


def test_log_probs_are_of_the_distribution_that_was_sampled_from() -> None:
    model = tiny("llama", initializer_range=0.5)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1]
    for settings, scores in (
        ({"temperature": 0.5}, logits / 0.5),
        ({"top_k": 4}, logits.where(logits >= logits.topk(4).values[-1], -torch.inf)),
        ({"min_p": 0.5}, logits.where(logits.softmax(-1) >= 0.5 * logits.softmax(-1).max(), -torch.inf)),
    ):
        for one in engine(model, max_new_tokens=1, **settings).generate(PROMPTS[:1], 16):
            assert one.logps[0] == pytest.approx(float(scores.log_softmax(-1)[one.completion[0]]), abs=1e-5), settings
    nucleus = {one.completion[0] for one in engine(model, max_new_tokens=1, top_p=1e-6).generate(PROMPTS[:1], 8)}
    assert nucleus == {int(logits.argmax())}


def test_temperature_zero_takes_the_likeliest_token() -> None:
    model = tiny("llama")
    one, again = engine(model, temperature=0.0, ends=(), top_k=3).generate(PROMPTS[:1], 2)
    ids = list(PROMPTS[0])
    for token, logp in zip(one.completion, one.logps, strict=True):
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert (token, logp) == (int(logps.argmax()), pytest.approx(float(logps.max()), abs=1e-5))
        ids.append(token)
    assert again.completion == one.completion


def test_a_completion_depends_on_its_seed_alone() -> None:
    """Not on micro-batches, on the order of prompts, on n, or on torch's generator; and torch's generator stays as it is."""
    model = tiny("llama")
    torch.manual_seed(1)
    state = torch.get_rng_state()
    whole_batch = engine(model).generate(PROMPTS, 3, seeds=[7, 8, 9])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    one_by_one = engine(model, batch_size=1).generate(PROMPTS[::-1], 2, seeds=[9, 8, 7])
    by_prompt = {(tuple(one.prompt), i % 2): one.completion for i, one in enumerate(one_by_one)}
    for i, one in enumerate(whole_batch):
        if i % 3 < 2:
            assert by_prompt[tuple(one.prompt), i % 3] == one.completion
    assert engine(model).generate(PROMPTS, 1, seeds=[1, 2, 3])[0].completion != whole_batch[0].completion


def test_by_default_the_seed_changes_with_version_and_settings() -> None:
    model = tiny("llama")
    first = engine(model)
    before = [one.completion for one in first.generate(PROMPTS[:1] * 2)]
    assert before[0] != before[1]
    assert [one.completion for one in first.generate(PROMPTS[:1] * 2)] == before
    first.sync(3)
    after = first.generate(PROMPTS[:1] * 2)
    assert [one.version for one in after] == [3, 3]
    assert [one.completion for one in after] != before
    assert [one.completion for one in engine(model, seed=5).generate(PROMPTS[:1] * 2)] != before
    assert derived(0, 1) != derived(1, 0)


def test_completions_end_at_their_first_end_token() -> None:
    model = tiny("llama")
    free = engine(model, ends=()).generate(PROMPTS, 4)
    assert {(len(one.completion), one.finished) for one in free} == {(12, False)}
    ends = sorted({free[0].completion[4], free[5].completion[0]})
    for one, whole_one in zip(engine(model, ends=ends).generate(PROMPTS, 4), free, strict=True):
        assert (one.completion, one.finished) == cut(whole_one.completion, ends)
        assert one.logps == pytest.approx(whole_one.logps[: len(one.completion)], abs=1e-5)
    kept = engine(model, ends=ends, stop_at_eos=False).generate(PROMPTS, 4)
    assert [one.completion for one in kept] == [one.completion for one in free]
    assert cut([5, 7, 3, 7], [7, 3]) == ([5, 7], True)


def test_settings_of_the_model_do_not_leak_in() -> None:
    """Hub models come with a repetition penalty, a top_k or a minimum length in their generation_config."""
    model = trained()
    plain = engine(model).generate(PROMPTS, 2)
    model.generation_config = GenerationConfig(repetition_penalty=5.0, top_k=1, do_sample=True, min_new_tokens=12, max_length=9)
    theirs, forward = model.generation_config, model.forward
    assert engine(model).generate(PROMPTS, 2) == plain
    assert model.generation_config is theirs
    assert model.forward == forward
    assert model.training


def test_the_adapter_is_on() -> None:
    base = tiny("llama")
    adapted = get_peft_model(tiny("llama"), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    attach(adapted)
    rollouts = engine(adapted.train()).generate(PROMPTS, 2)
    assert [one.completion for one in rollouts] != [one.completion for one in engine(base).generate(PROMPTS, 2)]
    ours = [logp for one in rollouts for logp in one.logps]
    assert ours == pytest.approx(trainer_logps(adapted.eval(), rollouts), abs=1e-5)


@pytest.fixture
def group():
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_wrapped_models(group: None) -> None:
    model = trained()
    plain = engine(model).generate(PROMPTS, 2)
    wrapped = DistributedDataParallel(model)
    assert engine(wrapped).generate(PROMPTS, 2) == plain
    with whole(wrapped) as inside:
        assert inside is causal_lm(model)
    with pytest.raises(UserError, match="sharded by FSDP; possible"):
        engine(fully_shard(tiny("llama"))).generate(PROMPTS)


def test_prompts_that_cannot_be_continued() -> None:
    model = tiny("gpt2")
    with pytest.raises(UserError, match=r"prompt 2 of 2 has 250 tokens, which with max_new_tokens = 12 is more than .* 256"):
        engine(model).generate([[1], [1] * 250])
    with pytest.raises(UserError, match="prompt 1 of 1 is empty"):
        engine(model).generate([[]])


def test_the_probe_tells_other_weights_from_rounding(caplog: pytest.LogCaptureFixture) -> None:
    model = trained()
    rollouts = engine(model).generate(PROMPTS, 2)
    ours = trainer_logps(model, rollouts)
    sizes = [len(one.completion) for one in rollouts]
    split = [ours[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))]
    assert probe(rollouts, split, "engine") == pytest.approx(1, abs=1e-5)
    off = [[logp + 0.1 * (-1) ** i for i, logp in enumerate(one)] for one in split]
    assert probe(rollouts, off, "engine") == pytest.approx(math.exp(0.1), abs=1e-4)
    assert "engine: its log-probs are off the trainer's by a factor of 1.11 a token" in caplog.text
    with pytest.raises(UserError, match=r"by a factor of 2.72 a token; it samples from other weights"):
        probe(rollouts, [[logp - 1 for logp in one] for one in split], "engine")
    with pytest.raises(UserError, match="by a factor of nan"):
        probe(rollouts, [[math.nan] * size for size in sizes], "engine")


def test_truncation_is_warned_of() -> None:
    assert truncation_warning(SamplingConfig(temperature=0.7)) is None
    assert truncation_warning(SamplingConfig(temperature=0.0, top_k=5)) is None
    assert truncation_warning(SamplingConfig(top_p=0.9, min_p=0.05)).startswith("sampling: top_p = 0.9, min_p = 0.05 samples")
    with pytest.raises(UserError, match="top_p = 0"):
        parse(SamplingConfig, {"top_p": 0}, "sampling")


def test_the_numbers_behind_a_draw_cover_the_tail() -> None:
    """A number just below 1 takes the last token that has any probability, never one that has none."""
    logps = torch.tensor([[0.5, 0.25, 0.25 - 1e-7, 1e-7, 0.0]]).log()
    for number, token in ((0.0, 0), (0.4999, 0), (0.5, 1), (0.75, 2), (1 - 2**-53, 3)):
        assert int(_Draw._invert(logps, torch.tensor([[number]], dtype=torch.float64))) == token, number
    assert math.isinf(float(logps[0, 4]))
