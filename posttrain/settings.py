"""The settings of a run, declared once: help, validation, JSON schema and docs are read from here. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import BeforeValidator, WithJsonSchema

from .schema import STRICT, NonNegative, NonNegativeInt, Positive, PositiveInt, Probability


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is trained, and how it is loaded."""

    name: str
    """Hub id or folder of a causal language model."""

    revision: str | None = None
    """Branch, tag or commit on the hub; None is the default branch."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the parameters. auto: float32 for full fine-tuning (master weights; train.bf16 sets the compute dtype), and
    bfloat16 under an adapter where the device computes in it."""

    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] | None = None
    """Attention implementation; None is the model's default. flex_attention, for NVIDIA GPUs, skips what tokens of a packed row
    may not see of it; elsewhere sdpa takes its place."""

    tokenizer: str | None = None
    """Hub id or folder of the tokenizer; None is the model's own."""

    chat_template: str | None = None
    """Chat template (Jinja text or a file with it) in place of the tokenizer's own."""

    trust_remote_code: bool = False
    """Run code that comes with the model."""

    dropout: bool = False
    """Keep the model's own dropout while training; off, so that policy and reference start equal."""

    peft: dict[str, Any] | None = None
    """Settings of a PEFT adapter, verbatim (r, lora_alpha, target_modules, ...; peft_type LORA unless given); None: none."""

    merge: bool = False
    """Merge the adapter into the exported model."""


@dataclass(frozen=True, kw_only=True)
class TeacherModel:
    """One of several teachers, or of the checkpoints that a reference is the mean of."""

    __pydantic_config__ = STRICT

    name: str
    """Hub id or folder of a causal language model, of any size and width."""

    weight: Positive = 1.0
    """Its share in the loss, or in the mean of weights, in proportion to the others'."""

    revision: str | None = None
    """Branch, tag or commit on the hub; None is the default branch."""


def _listed(got: Any) -> Any:
    """One teacher, by name or as a mapping, as a list of one."""
    several = got if isinstance(got, list | tuple) else [] if got is None else [got]
    return [{"name": one} if isinstance(one, str) else one for one in several]


TeacherModels = Annotated[tuple[TeacherModel, ...], BeforeValidator(_listed), WithJsonSchema({"type": "string"})]
"""A name, {name, weight, revision}, or a list of these."""


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """Where the reference's log-probs come from."""

    kind: Literal["auto", "frozen", "adapter", "cached", "ema", "soup"] = "auto"
    """frozen: a second model; adapter: the policy with its adapter off; cached: log-probs computed once and kept on disk; ema:
    a second model, a moving average of the policy; soup: a second model whose weights are the mean of
    several checkpoints' (SALSA). auto: adapter where one is trained, frozen otherwise."""

    model: str | None = None
    """Hub id or folder of the reference; None is the policy as it starts."""

    cache: str | None = None
    """Folder of cached log-probs; None is $POSTTRAIN_CACHE or ~/.cache/posttrain."""

    rate: Annotated[float, Gt(0), Le(1)] | None = None
    """ema: share of the policy at each update, reference <- (1 - rate) reference + rate policy; 0.01 when absent."""

    period: PositiveInt | None = None
    """ema: optimizer steps from one update to the next; 1 when absent."""

    models: TeacherModels = ()
    """soup: two or more checkpoints, as hub ids, folders or {name, weight, revision}; weights are shares, equal when absent."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Who teaches: the other distribution of a distillation."""

    model: TeacherModels = ()
    """Hub id or folder of the teacher, {name, weight, revision}, or a list of these: the loss is then the weighted mean of the
    losses beside each. It reads the student's token ids, so its tokenizer has to be the same; spare rows of either are cut."""

    kind: Literal["auto", "model", "adapter", "cached", "served"] = "auto"
    """model: a model of its own, frozen; adapter: the student with its adapter off (self-distillation). For methods that read a
    teacher's likeliest items only (kd with top), which are then kept on disk: cached: of a model (or, without one, of the
    student with its adapter off), computed before training; served: of a vLLM server, asked before training. auto: model."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of its parameters. auto: bfloat16 where the device computes in it, float32 elsewhere."""

    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] | None = None
    """Its attention implementation; None is the model's default."""

    trust_remote_code: bool = False
    """Run code that comes with it."""

    cache: str | None = None
    """cached, served: folder that keeps what the teacher says; None is $POSTTRAIN_CACHE or ~/.cache/posttrain."""

    url: str | None = None
    """served: address of a vLLM server, such as http://localhost:8000, whose model, where `model` names none, is the first it
    lists. A key is read from $POSTTRAIN_TEACHER_API_KEY."""

    timeout: Positive | None = None
    """served: seconds to wait for an answer; 600 when absent."""

    retries: NonNegativeInt | None = None
    """served: attempts after a failed one, with growing pauses; 8 when absent, which is a minute and a half."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data set of a mixture, or the one to evaluate on."""

    __pydantic_config__ = STRICT

    name: str | None = None
    """Hub id, file or folder; for `eval`, the training set's when absent."""

    subset: str | None = None
    """Configuration of a hub data set."""

    split: str | None = None
    """Split to read; `train`, or the only one, when absent."""

    columns: Mapping[str, str] | None = None
    """What a column is for -> its name, where detection is wrong; the training set's `columns` when absent."""

    limit: PositiveInt | None = None
    """Read only the first rows."""

    weight: Positive = 1.0
    """In a mixture, how often each row is used in an epoch: 0.25 takes a random quarter, 2 takes every row twice. Of streams,
    whose size is unknown, the relative rate at which rows are drawn."""


EvalSource = Annotated[Source, BeforeValidator(lambda got: {"name": got} if isinstance(got, str) else got)]
"""A data set, or just its name."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Settings of the data."""

    name: str | None = None
    """Hub id, local .json, .jsonl, .parquet, .csv or .tsv file, or folder."""

    mixture: tuple[Source, ...] = ()
    """Several data sets instead of `name`: a list of {name, weight, subset, split, columns, limit}."""

    subset: str | None = None
    """Configuration of a hub data set."""

    split: str | None = None
    """Split to train on; `train`, or the only one, when absent. Slices such as `train[:10%]` work."""

    eval: EvalSource | None = None
    """Separate rows to evaluate on: a name, or {name, subset, split, columns, limit}."""

    eval_size: NonNegativeInt = 0
    """Rows to hold out for evaluation instead: drawn with `seed`, of a stream the first ones."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """What a column is for -> its name, where detection is wrong, such as {prompt: question}."""

    format: Literal["auto", "chat", "plain"] = "auto"
    """`chat` renders text through the tokenizer's chat template (a prompt is one user turn, an HH transcript is its turns),
    `plain` takes it as it stands, `auto` is chat wherever there is a template and the text is not rendered already."""

    system: str | None = None
    """System prompt for rows that have none."""

    max_length: Annotated[int, Ge(2)] = 1024
    """Tokens of the prompt and any one completion together."""

    max_prompt: PositiveInt | None = None
    """Tokens of the prompt; no limit of its own when absent."""

    too_long: Literal["drop", "truncate_prompt", "error"] = "drop"
    """Longer rows: leave out, cut the prompt from the left (its leading special tokens and completions stay whole), or stop."""

    identical: Literal["drop", "keep", "error"] = "drop"
    """Pairs of equal completions: they have no gradient in a preference loss and only blur its metrics."""

    empty: Literal["drop", "error"] = "drop"
    """Rows with an empty completion or prompt: leave out, or stop."""

    unpair: bool = False
    """Make two rows of every pair: the chosen completion as a desirable one, the rejected as an undesirable one. For methods
    that read one completion and a label; `limit`, `eval_size` and all counts are of pairs."""

    limit: PositiveInt | None = None
    """Read only the first rows of each training set."""

    streaming: bool = False
    """Read rows as they are needed, without download or cache; training then needs train.max_steps."""

    shuffle_buffer: NonNegativeInt | None = None
    """Streaming only: rows to shuffle among, 1000 when absent; 0 keeps their order. (Otherwise the trainer shuffles.)"""

    seed: NonNegativeInt = 0
    """Of held-out rows, mixture and stream. The order within an epoch is the trainer's (train.seed)."""

    num_proc: PositiveInt | None = None
    """Processes that tokenise; one when absent."""


Strings = Annotated[tuple[Annotated[str, MinLen(1)], ...], BeforeValidator(lambda got: [got] if isinstance(got, str) else got)]
"""A list of strings, or just one."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How completions are sampled. Log-probs that an engine returns are those of the distribution it samples from."""

    max_new_tokens: PositiveInt = 256
    """Tokens of a completion at most, its end token included."""

    temperature: NonNegative = 1.0
    """Logits are divided by it; 0 takes the likeliest token (its log-prob is then that at temperature 1)."""

    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Sample among the likeliest tokens that hold this much probability; 1 is off."""

    top_k: NonNegativeInt = 0
    """Sample among that many likeliest tokens; 0 is off."""

    min_p: Probability = 0.0
    """Sample among the tokens at least this likely relative to the likeliest; 0 is off."""

    seed: NonNegativeInt = 0
    """Of the random numbers, from which each completion takes its own, whatever is sampled beside it."""

    stop_at_eos: bool = True
    """End a completion with its end token; otherwise each has max_new_tokens tokens."""

    stop: Strings | None = None
    """End a completion before the first of these strings in its text, such as ["\\n\\nHuman:"]. Tokens that it reaches into are
    left out: they are not scored, counted or learned from, so policy optimisation makes them neither likelier nor less likely.
    A completion may be left without any token; superhf keeps none of these."""

    @property
    def truncated(self) -> bool:
        """Whether tokens are left out of the distribution."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What samples completions."""

    kind: Literal["hf", "vllm", "file"] = "hf"
    """hf: the model in this process; vllm: vLLM, started by this process or a server; file: what was sampled before."""

    batch_size: PositiveInt | None = None
    """hf: completions that are sampled at a time; 32 when absent."""

    url: str | None = None
    """vllm: address of a server, such as http://localhost:8000; None starts vLLM here."""

    timeout: Positive | None = None
    """vllm with url: seconds to wait for an answer; 600 when absent."""

    retries: NonNegativeInt | None = None
    """vllm with url: attempts after a failed one, with growing pauses; 8 when absent, which is a minute and a half."""

    options: dict[str, Any] | None = None
    """vllm without url: arguments of vllm.LLM, verbatim (dtype, max_model_len, gpu_memory_utilization, ...)."""

    path: str | None = None
    """file: JSON lines of prompts and completions."""


@dataclass(frozen=True, kw_only=True)
class IterationsConfig:
    """How a policy is trained in iterations, each on what the last iterate wrote."""

    count: PositiveInt = 3
    """Number of iterations."""

    responses: Annotated[int, Ge(2)] = 8
    """Responses to each prompt, from which the pair or the best one is selected."""

    prompts: PositiveInt | None = None
    """Prompts of an iteration; none is in two of them. None: equal parts of all."""

    shuffle: bool = True
    """Deal the prompts to the iterations at random (data.seed); false: in their order, such as a mixture of a set for each."""

    select: Literal["auto", "tournament", "everyone", "scores"] = "auto"
    """How the responses to a prompt are ranked. tournament: by knock-out, as INPO does; everyone: by the mean probability to
    win against another; scores: by their scores. Pairs whose best is not preferred to their worst are dropped. auto: scores
    with reward alone; with preference tournament for pairs, everyone for methods that learn from the best response alone."""

    at_least: float | None = None
    """Score that the best response has to have to be learned from; None: any."""

    reference: Literal["start", "previous"] = "start"
    """The reference of every iteration: the model that the first one starts from, or the last iterate."""

    evaluate: NonNegativeInt = 64
    """Prompts on which iterates are compared with the last one and with the start: of data.eval or data.eval_size, else held
    out, at most a tenth of all; 0: none."""


@dataclass(frozen=True, kw_only=True)
class RolloutsConfig:
    """Which completions the models write themselves: of a distillation, where not the data's are learned from; of an online
    method, which learns from nothing else, how many and how often."""

    student: Probability = 0.0
    """Distillation: share of the steps whose completions the student samples itself, anew each time."""

    teacher: Probability = 0.0
    """Distillation: share of the steps whose completions the teacher samples (of several, the first)."""

    corrections: NonNegativeInt = 0
    """Distillation: how often the teacher corrects the token of a student's completion at which they differ most, before the
    student writes on from there (SCRG)."""

    group_size: PositiveInt | None = None
    """Online methods: completions of each prompt, which are compared with each other; 8 when absent."""

    every: PositiveInt | None = None
    """Online methods: optimizer steps whose prompts are sampled at once, with the same weights: a round; 1 when absent."""

    epochs: PositiveInt | None = None
    """Online methods: how often a round is learned from before the next is sampled; 1 when absent."""

    def __post_init__(self) -> None:
        if self.student + self.teacher > 1:
            raise ValueError(
                f"student {self.student:g} and teacher {self.teacher:g} are shares of the steps; together at most 1"
            )
        if self.corrections and not self.student:
            raise ValueError("corrections are of the student's completions; give student a share")


OF_DISTILLATION = ("student", "teacher", "corrections")
"""Settings of rollouts that online methods do not have; they have the others."""

GROUP = 8
"""Completions of a prompt, where `group_size` is absent."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """What completions are worth: the weighted sum of what scorers say."""

    scorers: tuple[dict[str, Any], ...] = ()
    """A scorer's name (length, regex, format, answer, vader, model, or module:function of your own), {name, weight, and its
    settings}, or a list of these, whose scores are added with their weights (1 when absent)."""

    heldout: dict[str, Any] | None = None
    """A scorer that is only logged: where it falls while the reward grows, the reward is being gamed."""


def reward_values(written: Mapping[str, Any]) -> dict[str, Any]:
    """The section `reward` of a recipe, in any of the forms it may be written in, as values of `RewardConfig`."""
    values = dict(written)
    heldout = values.pop("heldout", None)
    scorers = values.pop("scorers", None)
    if scorers is None:
        name = values.pop("name", None)
        several = isinstance(name, list | tuple)
        scorers = list(name) if several else [{"name": name, **values}] if name is not None or values else []
        values = values if several else {}
    found = [{"name": one} if isinstance(one, str) else one for one in scorers]
    return {**values, "scorers": found, "heldout": {"name": heldout} if isinstance(heldout, str) else heldout}
