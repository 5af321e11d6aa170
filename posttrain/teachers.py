"""Who teaches a distillation: how teachers are loaded, what they have in common with the student, and the mean over several."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from . import registry
from .foreign import Foreign
from .models import attach, bf16_available, load_config, load_model, load_tokenizer, parameter_counts
from .recipe import Run
from .reference import AdapterOff, FrozenModel, Teachers
from .registry import Objective
from .schema import UserError
from .settings import ModelConfig, TeacherModel
from .stats import Loss


def describe(run: Run) -> str:
    """Who teaches a run, in words."""
    if run.teacher.kind == "served":
        return f"{run.teacher.model[0].name if run.teacher.model else 'the model'} served at {run.teacher.url}"
    if not run.teacher.model:
        return AdapterOff.description
    if run.teacher.kind == "cached":
        return f"cached: {run.teacher.model[0].name}"
    shares = zip(run.teacher.model, weights(run), strict=True)
    return ", ".join(one.name if len(run.teacher.model) == 1 else f"{one.name} ({share:.0%})" for one, share in shares)


def weights(run: Run) -> list[float]:
    """The share of each teacher in the loss; they sum to 1."""
    if not run.teacher.model:
        return [1.0]
    total = sum(one.weight for one in run.teacher.model)
    return [one.weight / total for one in run.teacher.model]


def common_tokens(run: Run, tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of tokens, from id 0 on, that student and teachers have in common and read alike.

    Output rows beyond the last token of a tokenizer are padding and do not count, except where the student teaches itself. A
    served teacher is asked of its tokens when it is asked of the data; until then they are the student's, rows and all.

    Raises:
        UserError: an id stands for different tokens.
    """
    if run.teacher.kind == "served" or not run.teacher.model:
        return _rows(run.model)
    ours = _by_id(tokenizer)
    sizes = [len(ours)]
    for one in run.teacher.model:
        theirs = _by_id(load_tokenizer(_settings(run, one), "teacher.model"))
        sizes.append(len(theirs))
        shared, differing = min(len(ours), len(theirs)), _differing(ours, theirs)
        if differing:
            first = differing[0]
            others = "; uld accepts other tokenizers" if "uld" in registry.names() else ""
            raise UserError(
                f"teacher: {one.name} has another tokenizer than {run.model.name}: {len(differing)} of {shared} ids stand for "
                f"other tokens, {first} for {theirs[first]!r} and {ours[first]!r}; {run.objective.name} compares probabilities "
                f"id by id{others}"
            )
    return min(sizes)


def other_tokenizer(run: Run, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase | None:
    """The teacher's tokenizer where it is another one than the student's and the objective does not mind; else None.

    Raises:
        UserError: it is another one, and there are several teachers, or rollouts that it would have to write.
    """
    if not (run.objective.reads_teacher and run.objective.any_tokenizer):
        return None
    others = [load_tokenizer(_settings(run, one), "teacher.model") for one in run.teacher.model]
    others = [other for other in others if _differing(_by_id(tokenizer), _by_id(other))]
    if others and len(run.teacher.model) > 1:
        raise UserError("teacher: of several teachers each needs the student's tokenizer; give one model")
    if others and (run.rollouts.teacher or run.rollouts.corrections):
        raise UserError(
            "rollouts: a teacher with another tokenizer can neither write nor correct them; rollouts.student is possible"
        )
    return others[0] if others else None


def vocabulary(run: Run, tokenizer: PreTrainedTokenizerBase) -> str:
    """What student and teachers have in common, in words."""
    other = other_tokenizer(run, tokenizer)
    if other is not None:
        return f"{len(tokenizer):,} tokens of the student, {len(other):,} of the teacher, whose tokenizer is another one"
    size = common_tokens(run, tokenizer)
    if run.teacher.kind == "served":
        return f"{size:,} rows of {run.model.name}; the server is asked of its tokens before it is asked of the data"
    rows = {run.model.name: _rows(run.model)} | {one.name: _rows(_settings(run, one)) for one in run.teacher.model}
    told = ", ".join(f"{name} has {count:,} rows" for name, count in rows.items())
    return f"{size:,} tokens in common ({told})"


def refuse_unread(run: Run, size: int, rows: Any) -> None:
    """Every id of the data is one that the teachers can read.

    Args:
        size: tokens that student and teachers have in common.
        rows: tokenised rows; of a stream, which cannot be looked through, the first ones.

    Raises:
        UserError: a row has an id beyond `size`.
    """
    roles = [name for name in rows[0] if name != "prompt"] if len(rows) else []
    for number, row in enumerate(rows, start=1):
        ids = [*row["prompt"], *(id for role in roles for completion in row[role] for id in completion)]
        if max(ids) >= size:
            raise UserError(
                f"teacher: row {number} of the data has token {max(ids)}, and {describe(run)} knows the first {size} only; "
                "take a tokenizer or a chat template without it"
            )


def build(run: Run, size: int | None) -> Teachers | Foreign | None:
    """The models that teach a run; None where it has no teacher.

    Args:
        size: tokens that they have in common with the student; None where the one teacher has another tokenizer.

    Raises:
        UserError: one cannot be loaded.
    """
    if not run.objective.reads_teacher:
        return None
    if not run.teacher.model:
        return Teachers([AdapterOff()], [1.0], size)
    members = []
    for one in run.teacher.model:
        model = load_model(_settings(run, one), low_precision=True, where="teacher.model")
        attach(model)
        members.append(FrozenModel(model, one.name))
    return Foreign(members[0]) if size is None else Teachers(members, weights(run), size)


def positions(run: Run) -> int | None:
    """Tokens that the first teacher can read; None where its configuration does not say."""
    config = load_config(_settings(run, run.teacher.model[0]), "teacher.model")
    return config.get_text_config().to_dict().get("max_position_embeddings")


def sizes(run: Run) -> int:
    """Bytes of the teachers' parameters that are held while training, from their configurations."""
    total = 0
    for one in run.teacher.model if run.objective.reads_teacher and run.teacher.kind in ("auto", "model") else ():
        settings = _settings(run, one)
        dtype = settings.dtype if settings.dtype != "auto" else "bfloat16" if bf16_available() else "float32"
        with torch.device("meta"):
            config = load_config(settings, "teacher.model")
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=settings.trust_remote_code)
        total += parameter_counts(model)[0] * vars(torch)[dtype].itemsize
    return total


def held(reference: Any) -> int:
    """Bytes of the parameters of teachers that are loaded; partitioned ones are counted whole, other references not at all."""
    models = reference.models if isinstance(reference, Teachers | Foreign) else ()
    return sum(parameter_counts(model)[0] * next(model.parameters()).element_size() for model in models)


def weighted(objective: Objective, shares: Sequence[float]) -> Objective:
    """The objective whose loss is the weighted mean of its losses beside each of several teachers.

    A metric is the weighted mean, too, and `<metric>/teacher<i>` what it is beside teacher i, from 1.
    """
    if len(shares) == 1:
        return objective
    function: Callable[..., Any] = objective.function

    def mean(config: Any, statistics: Any) -> Loss:
        return _mean([function(config, one) for one in (statistics, *statistics.others)], shares)

    return dataclasses.replace(objective, function=mean)


def _mean(losses: Sequence[Loss], shares: Sequence[float]) -> Loss:
    first = losses[0]
    blend = lambda tensors: sum(share * one for share, one in zip(shares, tensors, strict=True))  # noqa: E731
    metrics = {name: blend([loss.metrics[name] for loss in losses]) for name in first.metrics}
    for i, loss in enumerate(losses, start=1):
        metrics |= {f"{name}/teacher{i}": values for name, values in loss.metrics.items()}
    plus = None if first.plus is None else _mean([loss.plus for loss in losses], shares)
    remember = {name: blend([loss.remember[name] for loss in losses]) for name in first.remember}
    return Loss(blend([loss.values for loss in losses]), metrics, first.per, plus, remember)


def _settings(run: Run, one: TeacherModel) -> ModelConfig:
    teacher = run.teacher
    return ModelConfig(
        name=one.name,
        revision=one.revision,
        dtype=teacher.dtype,
        attention=teacher.attention,
        trust_remote_code=teacher.trust_remote_code,
    )


def _differing(ours: list[str | None], theirs: list[str | None]) -> list[int]:
    """The ids that stand for one token here and for another there, as far as both have them."""
    return [id for id, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]]


def _by_id(tokenizer: PreTrainedTokenizerBase) -> list[str | None]:
    """The token of each id; None where there is none."""
    vocabulary = tokenizer.get_vocab()
    tokens: list[str | None] = [None] * (max(vocabulary.values()) + 1)
    for token, id in vocabulary.items():
        tokens[id] = token
    return tokens


def _rows(settings: ModelConfig) -> int:
    return load_config(settings).get_text_config().vocab_size
