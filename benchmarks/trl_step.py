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


def _adapter(options: argparse.Namespace) -> dict[str, Any]:
    from peft import LoraConfig

    config = LoraConfig(r=options.lora, lora_alpha=2 * options.lora, target_modules="all-linear", task_type="CAUSAL_LM")
    return {"peft_config": config}


def _reference(options: argparse.Namespace) -> dict[str, Any]:
    """As these trainers would load it by themselves, from a folder: also where its log-probs are precomputed."""
    return _adapter(options) if options.lora else {"ref_model": load_model(options)}


def _tokenised(base: type) -> type:
    class Tokenised(base):
        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

    return Tokenised


def _dpo(reference: str, rows: list[Row], arguments: dict[str, Any], options: argparse.Namespace) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    data = [{"prompt_ids": row["prompt"], **{f"{side}_ids": row[side][0] for side in ("chosen", "rejected")}} for row in rows]
    config = DPOConfig(**arguments, max_length=options.max_length, precompute_ref_log_probs=reference == "cached")
    return _tokenised(DPOTrainer)(
        model=load_model(options),
        args=config,
        train_dataset=Dataset.from_list(data),
        processing_class=load_tokenizer(options),
        **_reference(options),
    )


def _kto(reference: str, rows: list[Row], arguments: dict[str, Any], options: argparse.Namespace) -> Any:
    from datasets import Dataset
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
    return _tokenised(KTOTrainer)(
        model=load_model(options),
        args=config,
        train_dataset=Dataset.from_list(data),
        processing_class=load_tokenizer(options),
        **_reference(options),
    )


def _kd(reference: str, rows: list[Row], arguments: dict[str, Any], options: argparse.Namespace) -> Any:
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    class Given(DistillationTrainer):
        def _generate(self, prompts: list[str]) -> tuple:
            found = [rows[int(prompt)] for prompt in prompts]
            return [row["prompt"] for row in found], [row["completion"][0] for row in found], None, None, []

    teacher = load_model(options)
    return Given(
        model=fewer_layers(load_model(options), teacher.config.num_hidden_layers // 2),
        teacher_model=teacher,
        args=DistillationConfig(**arguments, beta=0.0, shuffle_dataset=False),  # 0 is forward KL
        train_dataset=Dataset.from_list([{"prompt": str(number)} for number in range(len(rows))]),
        processing_class=load_tokenizer(options),
        **(_adapter(options) if options.lora else {}),
    )


def _group(reference: str, rows: list[Row], arguments: dict[str, Any], options: argparse.Namespace) -> Any:
    from datasets import Dataset
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
    return Given(
        model=load_model(options),
        reward_funcs=rewards,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": str(number)} for number in range(len(rows))]),
        processing_class=load_tokenizer(options),
        **(_adapter(options) if options.lora else {}),
    )
