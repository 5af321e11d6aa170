"""Tokens a second and memory of a process, for DDP, ZeRO-2, ZeRO-3 and FSDP2, on one process and on several.

    python -m benchmarks.scaling --model <folder> --data pairs.jsonl [--engines ddp zero2 zero3] [--processes 1 2] [--steps 8]

Each run is `posttrain dpo` under `accelerate launch` with the shipped configuration: rows of a step grow with the processes, so
that each does the same work and a perfect engine keeps the tokens a second of a process. On a CPU every process gets one core
(`--cores`), and memory is its largest resident size; on GPUs it is what torch has allocated at most. FSDP2 and `--bf16` need
GPUs. Rates are medians over the counted steps; the first ones warm up.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile

import torch

from posttrain.records import read_metrics
from posttrain.shipped import launch_config

_WARMUP = 3


def measured(engine: str, processes: int, options: argparse.Namespace) -> tuple[float, float]:
    """(tokens a second of all processes, GiB of the largest) of one run."""
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
        return statistics.median(line["tokens_per_second"] for line in logs), logs[-1]["memory_gib"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--engines", nargs="+", default=["ddp", "zero2", "zero3"])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--cores", type=int, default=1, help="of each process, on a CPU")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--attention", help="sdpa, flash_attention_2, ...")
    options = parser.parse_args()
    found = {(e, n): measured(e, n, options) for n in options.processes for e in options.engines}
    print("| engine | processes | tokens/s | of the first row's per process | GiB a process | of DDP's |")
    print("|---|---|---|---|---|---|")
    least, one = next(iter(found))[1], next(iter(found.values()))[0]
    for (engine, processes), (rate, memory) in found.items():
        share = rate / processes / (one / least)
        beside = f"{memory / found['ddp', processes][1]:.2f}" if "ddp" in options.engines else ""
        print(f"| {engine} | {processes} | {rate:.0f} | {share:.2f} | {memory:.2f} | {beside} |")


if __name__ == "__main__":
    main()
