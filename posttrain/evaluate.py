"""`posttrain eval`: samples a model, scores what it writes, and says how far it is from the reference and how often it wins.

The output folder receives the samples of both models (`policy.jsonl`, `reference.jsonl`, as posttrain sample writes and
continues them) and `evaluation.json`, which `posttrain plot` reads:

- `reward`, of each scorer `reward/<name>`, and `reward/heldout`.
- `kl/sampled`: log policy - log reference of a completion, in nats; `kl/analytic`: in its place the sum, over the states on its
  way, of the divergence over the whole vocabulary. Both estimate the KL of whole completions; the second varies less.
- `entropy` and `length` of a completion, in nats a token and tokens; `finished`: the share that came to their end.
- `win_rate`: how often a completion is scored above one of the reference, to the same prompt; a tie counts half.
- `distinct_1`, `distinct_2`, `distinct_3` of all completions; `similarity`, where asked for.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from . import console, data
from .frontier import distinct, mean_and_error, wins
from .models import Request, attach, load_model, load_tokenizer, model_inputs
from .reference import FrozenModel
from .replacing import replacing
from .rewards.build import reward as build_reward
from .rewards.scorer import Scored
from .sample import KINDS, SampleRun, full_key, refuse_unsampled, sample
from .schema import NonNegativeInt, PositiveInt, UserError, parse
from .selfcheck import choose_layout
from .settings import DataConfig, EngineConfig, ModelConfig, RewardConfig, SamplingConfig, reward_values
from .similarity import meteor_similarity
from .stats import Completions
from .trees import TreeCollator, attention_scale
from .written import merge, read, section, split, whence

SHORT = {"model": "name", "reference": "name", "data": "name", "engine": "kind", "reward": "name"}
"""Sections that may be one word."""

NUMBERS = ("n", "similarity", "batch_size", "output")
"""Keys that are no sections."""

SECTIONS = (*SHORT, "sampling", *NUMBERS)
"""The keys of a recipe for an evaluation."""

FILE = "evaluation.json"


@dataclass(frozen=True, kw_only=True)
class EvalRun:
    """Everything that decides what is measured."""

    model: ModelConfig
    """The policy."""

    reference: ModelConfig | None = None
    """What it is compared with, usually the model that it started from; without one there is neither KL nor win rate."""

    data: DataConfig
    """Whose prompts are continued."""

    reward: RewardConfig
    """What completions are worth."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    """What samples."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """From which distribution: that of the model, or the KL would be another one's."""

    n: PositiveInt = 1
    """Completions of each prompt."""

    similarity: NonNegativeInt = 0
    """Prompts whose first completions are compared by METEOR; 0: none are."""

    batch_size: PositiveInt = 16
    """Completions whose KL is computed at a time."""

    output: str
    """Folder that receives samples and numbers; an evaluation that was interrupted goes on."""


def load_eval_run(recipe: str | Path | None = None, overrides: Sequence[str] = ()) -> EvalRun:
    """Read the settings of an evaluation; settings of `sampling` may stand without that word.

    Raises:
        UserError: whatever is wrong with them, in one line.
    """
    written = read(recipe, SECTIONS, SHORT)
    changes = {full_key(key, SECTIONS, SHORT): value for key, value in map(split, overrides)}
    values = merge(written, changes)
    where = whence(recipe, written, changes)
    kinds = KINDS | ({"reference": ModelConfig} if "reference" in values else {})
    parsed = {name: parse(kind, section(values, name, where, SHORT), where(name)) for name, kind in kinds.items()}
    parsed["reward"] = parse(RewardConfig, reward_values(section(values, "reward", where, SHORT)), where("reward"))
    run = parse(EvalRun, {**parsed, **{key: values[key] for key in NUMBERS if key in values}}, "eval")
    if not run.reward.scorers:
        raise UserError("eval: reward is required: a scorer such as --reward vader (posttrain eval --help)")
    if run.sampling.truncated or run.sampling.temperature != 1:
        raise UserError(
            "eval: sampling: the KL is that of the model's own distribution; leave temperature, top_p, top_k and min_p out"
        )
    for name in ("policy", "reference")[: 1 if run.reference is None else 2]:
        refuse_unsampled(_samples(run, name), where("engine"), "eval")
    return run


def _samples(run: EvalRun, name: str) -> SampleRun:
    """How the samples of policy or reference are made. A server has the policy's weights: the reference is sampled here."""
    model, engine = run.model, run.engine
    if name == "reference":
        ours = {"tokenizer": model.tokenizer or model.name, "chat_template": model.chat_template}  # the same prompts
        model, engine = dataclasses.replace(run.reference, **ours), EngineConfig() if engine.url is not None else engine
    output = str(Path(run.output, f"{name}.jsonl"))
    return SampleRun(model=model, data=run.data, engine=engine, sampling=run.sampling, n=run.n, output=output)


def evaluate(run: EvalRun) -> dict[str, Any]:
    """Measure a policy; returns what `evaluation.json` holds.

    Raises:
        UserError: a setting, the data, a model, the engine or a scorer. What was sampled stays.
    """
    reward = build_reward(run.reward)
    lines = {name: _sampled(_samples(run, name)) for name in ("policy", "reference")[: 1 if run.reference is None else 2]}
    loaded = data.load(run.data, load_tokenizer(run.model), (), source=True)
    stored = zip(loaded.train["source"], lines["policy"], strict=True)  # rows of token ids have no text of their own
    asked = [json.loads(text) if text else {"prompt": line["prompt"], "row": {}} for text, line in stored]
    scored = {name: _scored(reward, asked, side) for name, side in lines.items()}
    quantities = _gained(scored["policy"], lines["policy"])
    if run.reference is not None:
        quantities["win_rate"] = wins(scored["policy"].total, scored["reference"].total, run.n)
    found: dict[str, list[Tensor]] = {}
    done = _went(run, lines["policy"], found)
    console.track(done, len(lines["policy"]), "log-probs")
    quantities |= {name: torch.cat(parts).tolist() for name, parts in found.items()}
    texts = [text for line in lines["policy"] for text in line["completions"]]
    metrics = {name: mean_and_error(values, run.n) for name, values in quantities.items()}
    overall = {f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3)}
    if run.similarity:
        overall["similarity"] = meteor_similarity([line["completions"][0] for line in lines["policy"][: run.similarity]])
    told = {
        "model": run.model.name,
        "reference": run.reference and run.reference.name,
        "prompts": len(asked),
        "completions": len(texts),
        "metrics": {name: mean for name, (mean, _) in metrics.items()} | overall,
        "errors": {name: None if error != error else error for name, (_, error) in metrics.items()},
    }
    path = Path(run.output, FILE)
    with replacing(path) as partial:
        partial.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    _show(told, path)
    return told


def _sampled(run: SampleRun) -> list[dict[str, Any]]:
    sample(run)
    return [json.loads(line) for line in Path(run.output).read_text(encoding="utf-8").splitlines()]


def _scored(reward: Any, asked: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]]) -> Scored:
    """[B] scores of the completions in the lines of a file of samples."""
    rows = [(one, text) for one, line in zip(asked, lines, strict=True) for text in line["completions"]]
    return reward([one["prompt"] for one, _ in rows], [text for _, text in rows], [one["row"] for one, _ in rows])


def _gained(scored: Scored, lines: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """[B] each: what the completions are worth and how long they are."""
    parts = {f"reward/{name}": scores for name, scores in scored.parts.items()} if len(scored.parts) > 1 else {}
    heldout = {} if scored.heldout is None else {"reward/heldout": scored.heldout}
    return {
        "reward": scored.total,
        **parts,
        **heldout,
        "length": [float(len(ids)) for line in lines for ids in line["completion_ids"]],
        "finished": [float(ended) for line in lines for ended in line["finished"]],
    }


def _went(run: EvalRun, lines: Sequence[Mapping[str, Any]], found: dict[str, list[Tensor]]) -> Iterator[int]:
    """Add to `found`, a few completions at a time, their entropies and how far they are from the reference; yields the prompts
    that are done."""
    rows = [{"prompt": line["prompt_ids"], "completion": line["completion_ids"]} for line in lines]
    policy = _model(run.model)
    layout, _ = choose_layout(policy, rows[:8], ("completion",))
    reference = None
    if run.reference is not None:
        reference = FrozenModel(_model(run.reference), run.reference.name)
        _refuse_other_vocabulary(policy, reference.model)
        layout, _ = choose_layout(reference.model, rows[:8], ("completion",), "auto" if layout == "tree" else "separate")
    collator = TreeCollator(("completion",), layout=layout, attention_scale=attention_scale(policy.config))
    some = max(1, run.batch_size // run.n)
    for start in range(0, len(rows), some):
        batch = {name: tensor.to(PartialState().device) for name, tensor in collator(rows[start : start + some]).items()}
        with torch.no_grad():
            for name, values in _read(policy, reference, batch, layout).items():
                found.setdefault(name, []).append(values.double().cpu())
        yield min(start + some, len(rows))


def _read(policy: nn.Module, reference: FrozenModel | None, batch: dict[str, Tensor], layout: Any) -> dict[str, Tensor]:
    """[B] each, of the completions of a batch."""
    request = Request(gather=batch["gather"], targets=batch["targets"], want=("logp", "entropy"))
    if reference is not None:
        heads, _ = reference.heads(policy, batch, layout, dataclasses.replace(request, want=()))
        request = dataclasses.replace(request, refs=heads, want=(*request.want, "ref_logp", "reverse_kl"))
    said = policy(**model_inputs(policy, batch, layout), statistics=request)
    one = Completions(logps=said["logp"], lengths=batch["lengths.completion"], reference_logps=said.get("ref_logp"), more=said)
    found = {"entropy": one.mean(one["entropy"])}
    return found if reference is None else {**found, "kl/sampled": one.logratio, "kl/analytic": one.sum(one["reverse_kl"])}


def _model(settings: ModelConfig) -> nn.Module:
    model = load_model(settings, low_precision=True)
    attach(model)
    return model.to(PartialState().device).eval().requires_grad_(False)


def _refuse_other_vocabulary(policy: nn.Module, reference: nn.Module) -> None:
    ours, theirs = (model.get_output_embeddings().weight.shape[0] for model in (policy, reference))
    if ours != theirs:
        raise UserError(f"eval: the reference has {theirs} tokens and the model {ours}; a KL needs the same ones")


def _show(told: Mapping[str, Any], path: Path) -> None:
    errors = told["errors"]
    rows = {
        name: f"{value:.4f}" + (f" +- {errors[name]:.4f}" if errors.get(name) is not None else "")
        for name, value in told["metrics"].items()
    }
    console.show({**rows, "saved": str(path)}, title=f"{told['completions']} completions of {told['prompts']} prompts")
