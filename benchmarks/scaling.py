"""Tokens a second and memory of a process, for DDP, ZeRO-2, ZeRO-3 and FSDP2, on one process and on several.

    python -m benchmarks.scaling --model <folder> --data pairs.jsonl [--engines ddp zero2 zero3] [--processes 1 2] [--steps 8]
    python -m benchmarks.scaling --model shape:llama-1b --engines ddp zero3 fsdp2 --processes 1 --bf16 --attention sdpa

Each run is `posttrain dpo` under `accelerate launch` with the shipped configuration: rows of a step grow with the processes, so
that each does the same work and a perfect engine keeps the tokens a second of a process. On a CPU every process gets one core
(`--cores`), and memory is its largest resident size; on GPUs it is what torch has allocated at most. FSDP2 and `--bf16` need
GPUs. Rates are medians over the counted steps; the first ones warm up. A model may be `shape:<name>`, untrained, with rows
of random tokens, each as long as `--max-length` allows (material.py).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from posttrain.records import read_metrics
from posttrain.shipped import launch_config

from .machine import stamp
from .material import load_model, pairs, shape_of

_WARMUP = 3


def written(options: argparse.Namespace, folder: Path) -> None:
    """Model, tokenizer and rows of a shape in a folder, which the options then name; of other models nothing."""
    shape = shape_of(options)
    if shape is None:
        return
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, **{str(number): number for number in range(2, shape["vocab_size"])}}
    plain = Tokenizer(WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    load_model(argparse.Namespace(**vars(options), lora=None, dtype="float32", cpu=True)).save_pretrained(folder)
    count = max(options.processes) * options.batch * (_WARMUP + options.steps)
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for row in itertools.islice(pairs(options), count):
            sides = {side: " ".join(map(str, row[side][0][:-1])) for side in ("chosen", "rejected")}
            file.write(json.dumps({"prompt": " ".join(map(str, row["prompt"])) + " ", **sides}) + "\n")
    options.model, options.data = str(folder), str(folder / "pairs.jsonl")


def measured(engine: str, processes: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run: tokens a second of all processes, GiB of the largest."""
    with tempfile.TemporaryDirectory() as scratch:
        settings = {
            "model": options.model,
            "data": options.data,
            "data.max_length": options.max_length,
            "train.output_dir": scratch,
            "train.max_steps": _WARMUP + options.steps,
            "train.per_device_train_batch_size": options.batch,
            "train.gradient_checkpointing": str(options.checkpointing).lower(),
            "train.optim": "adamw_torch",
            "train.bf16": str(options.bf16).lower(),
            "train.logging_steps": 1,
            "train.save_strategy": "no",
        }
        if options.attention:
            settings["model.attention"] = options.attention
        launch = ["-m", "accelerate.commands.launch", "--config_file", str(launch_config(engine))]
        launch += ["--num_processes", str(processes), "--main_process_port", "0", "-m", "posttrain", "dpo"]
        command = [sys.executable, *launch, *(f"{key}={value}" for key, value in settings.items())]
        environment = dict(os.environ)
        if not torch.cuda.is_available():
            command = ["taskset", "--cpu-list", f"0-{processes * options.cores - 1}", *command]
            environment |= {"OMP_NUM_THREADS": str(options.cores), "DS_ACCELERATOR": "cpu"}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        logs = [line for line in read_metrics(scratch) if "loss" in line][_WARMUP:]
        rate = statistics.median(line["tokens_per_second"] for line in logs)
        return {"engine": engine, "processes": processes, "tokens_per_second": rate, "memory_gib": logs[-1]["memory_gib"]}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", help="preferences; a shape has rows of its own")
    parser.add_argument("--engines", nargs="+", default=["ddp", "zero2", "zero3"])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--cores", type=int, default=1, help="of each process, on a CPU")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--attention", help="sdpa, flash_attention_2, ...")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    if options.data is None and shape_of(options) is None:
        parser.error("--data belongs to a model that is no shape")
    print(stamp("accelerate", "deepspeed"))
    print("| engine | processes | tokens/s | of the first row's per process | GiB a process | of the first engine's |")
    print("|---|---|---|---|---|---|", flush=True)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        written(options, Path(scratch))
        for processes, engine in itertools.product(options.processes, options.engines):
            one = measured(engine, processes, options)
            found.append(one)
            beside = next(other for other in found if other["processes"] == processes)
            share = one["tokens_per_second"] / processes / (found[0]["tokens_per_second"] / found[0]["processes"])
            memory = one["memory_gib"]
            cells = f"{one['tokens_per_second']:.0f} | {share:.2f} | {memory:.2f} | {memory / beside['memory_gib']:.2f}"
            print(f"| {engine} | {processes} | {cells} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
