"""TRL's side of `benchmarks.step`: its trainers on given token ids.

Two of their private methods are replaced: the one that tokenises a data set (DPO, KTO), as the ids are given, and the one that
samples completions (distillation, GRPO, RLOO), as these are given, too. The training step stays theirs.
"""

from __future__ import annotations

import argparse
from typing import Any

from .material import GROUP, Row, fewer_layers, load_model, load_tokenizer, reward


def trainer(method: str, reference: str, rows: list[Row], arguments: dict[str, Any], options: argparse.Namespace) -> Any:
    """The trainer of a method."""
    build = {"dpo": _dpo, "kto": _kto, "kd": _kd, "group": _group}[method]
    return build(reference, rows, arguments, options)


def _build(
    kind: type, config: Any, data: list[dict[str, Any]], options: argparse.Namespace, model: Any = None, **own: Any
) -> Any:
    """A trainer, with what all of them take."""
    from datasets import Dataset
    from peft import LoraConfig

    if options.lora:
        rank = {"r": options.lora, "lora_alpha": 2 * options.lora}
        own["peft_config"] = LoraConfig(**rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return kind(
        model=model or load_model(options),
        args=config,
        train_dataset=Dataset.from_list(data),
        processing_class=load_tokenizer(options),
        **own,
    )


def _tokenised(base: type, config: Any, data: list[dict], options: argparse.Namespace) -> Any:
    """A trainer of token ids. Its reference is as it would load it by itself: also where log-probs are precomputed."""

    class Tokenised(base):
        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

    return _build(Tokenised, config, data, options, **({} if options.lora else {"ref_model": load_model(options)}))


def _dpo(reference: str, rows: list[Row], arguments: dict[str, Any], options: argparse.Namespace) -> Any:
    from trl import DPOConfig, DPOTrainer

    data = [{"prompt_ids": row["prompt"], **{f"{side}_ids": row[side][0] for side in ("chosen", "rejected")}} for row in rows]
    config = DPOConfig(**arguments, max_length=options.max_length, precompute_ref_log_probs=reference == "cached")
    return _tokenised(DPOTrainer, config, data, options)


def _kto(reference: str, rows: list[Row], arguments: dict[str, Any], options: argparse.Namespace) -> Any:
    from trl import KTOConfig, KTOTrainer

    data = [
        {
            "prompt_ids": row["prompt"],
            "completion_ids": row["completion"][0],
            "KL_completion_ids": row["mismatched"][0],
            "label": bool(row["label"]),
        }
        for row in rows
    ]
    config = KTOConfig(**arguments, max_length=options.max_length, precompute_ref_log_probs=reference == "cached")
    return _tokenised(KTOTrainer, config, data, options)


def _numbered(rows: list[Row]) -> list[dict]:
    """Prompts that are the numbers of rows, for trainers whose `_generate` is given what they say."""
    return [{"prompt": str(number)} for number in range(len(rows))]


def _kd(reference: str, rows: list[Row], arguments: dict[str, Any], options: argparse.Namespace) -> Any:
    from trl import DistillationConfig, DistillationTrainer

    class Given(DistillationTrainer):
        def _generate(self, prompts: list[str]) -> tuple:
            found = [rows[int(prompt)] for prompt in prompts]
            return [row["prompt"] for row in found], [row["completion"][0] for row in found], None, None, []

    teacher = load_model(options)
    student = fewer_layers(load_model(options), teacher.config.num_hidden_layers // 2)
    config = DistillationConfig(**arguments, beta=0.0, shuffle_dataset=False)  # 0 is forward KL
    return _build(Given, config, _numbered(rows), options, student, teacher_model=teacher)


def _group(reference: str, rows: list[Row], arguments: dict[str, Any], options: argparse.Namespace) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    class Given(GRPOTrainer):
        def _generate(self, prompts: list[str]) -> tuple:
            found = [rows[int(prompt)] for prompt in prompts]  # each prompt as often as it has completions
            completions = [row["completion"][i % GROUP] for i, row in enumerate(found)]
            return [row["prompt"] for row in found], completions, None, [""] * len(found), None, {}, None, []

    def rewards(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [reward(ids) for ids in completion_ids]

    config = GRPOConfig(
        **{**arguments, "per_device_train_batch_size": GROUP},
        num_generations=GROUP,
        max_completion_length=options.group_completion,
        shuffle_dataset=False,
    )
    return _build(Given, config, _numbered(rows), options, reward_funcs=rewards)
