"""One DPO training step, side by side with TRL: seconds, tokens, peak memory and the loss trajectories.

    python -m benchmarks.step --model <folder> --data pairs.jsonl [--batch 4] [--max-length 512] [--steps 10] [--rounds 2]

Pairs are plain text with columns prompt, chosen, rejected. TRL tokenises them; the same token ids, in the same order, go to
both sides. Each side runs in a process of its own (so that its peak memory is its own), the two alternate, and the table gives
medians over the counted steps of all rounds and ratios ours / TRL, for a live reference and for a precomputed one.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_WARMUP = 2


def train_arguments(folder: str, options: argparse.Namespace) -> dict:
    """Arguments that both sides train with."""
    return {
        "output_dir": folder,
        "max_steps": _WARMUP + options.steps,
        "per_device_train_batch_size": options.batch,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": options.checkpointing,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "logging_strategy": "steps",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": options.dtype == "bfloat16",
        "use_cpu": options.cpu,
        "seed": 1,
    }


def clock():
    """A callback that notes when each optimizer step began and ended."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *args, **kwargs) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs) -> None:
            self.seconds.append(time.perf_counter() - self.start)

    return Clock()


def run_trl(options: argparse.Namespace, folder: str) -> dict:
    """TRL's DPOTrainer; leaves its token ids in `rows.json` for the other side."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    data = load_dataset("json", data_files=options.data, split="train").select_columns(["prompt", "chosen", "rejected"])

    def fits(row: dict) -> bool:
        lengths = [len(tokenizer(row["prompt"] + row[side])["input_ids"]) for side in ("chosen", "rejected")]
        return options.min_length <= max(lengths) < options.max_length and row["chosen"] != row["rejected"]

    data = data.filter(fits).select(range((_WARMUP + options.steps) * options.batch))
    config = DPOConfig(
        **train_arguments(folder, options),
        max_length=options.max_length,
        precompute_ref_log_probs=options.reference == "cached",
    )
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="float32")
    timer = clock()
    trainer = DPOTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[timer])
    rows = [
        {"prompt": row["prompt_ids"], "chosen": [row["chosen_ids"]], "rejected": [row["rejected_ids"]]}
        for row in trainer.train_dataset
    ]
    Path(options.rows).write_text(json.dumps(rows))
    trainer.train()
    padded = sum(
        2 * options.batch * max(len(row["prompt"]) + len(row[side][0]) for row in rows[i : i + options.batch] for side in SIDES)
        for i in range(_WARMUP * options.batch, len(rows), options.batch)
    )
    return {"seconds": timer.seconds, "history": trainer.state.log_history, "tokens": padded / options.steps}


SIDES = ("chosen", "rejected")


def run_ours(options: argparse.Namespace, folder: str) -> dict:
    """Our trainer on the same token ids."""
    from datasets import Dataset
    from transformers import TrainingArguments

    from posttrain.models import attach, load_model, load_policy
    from posttrain.reference import CachedLogps, FrozenModel, fingerprint
    from posttrain.registry import find
    from posttrain.settings import ModelConfig
    from posttrain.trainer import Trainer

    settings = ModelConfig(name=options.model)
    rows = json.loads(Path(options.rows).read_text())
    policy = load_policy(settings)
    if options.reference == "live":
        frozen = load_model(settings)
        attach(frozen)
        reference = FrozenModel(frozen, options.model)
    else:
        reference = CachedLogps(Path(folder), fingerprint(options.model, policy, options.dtype), options.model)
        for _ in reference.fill(policy, rows, SIDES, "tree", options.batch):
            pass
        reference.reload()
    objective = find("dpo")
    timer = clock()
    trainer = Trainer(
        objective=objective,
        config=objective.config(),
        model=policy,
        args=TrainingArguments(**train_arguments(folder, options), remove_unused_columns=False),
        reference=reference,
        train_dataset=Dataset.from_list(rows),
        callbacks=[timer],
    )
    trainer.train()
    tokens = [
        trainer.collator()(rows[i : i + options.batch])["input_ids"].numel()
        for i in range(_WARMUP * options.batch, len(rows), options.batch)
    ]
    return {"seconds": timer.seconds, "history": trainer.state.log_history, "tokens": sum(tokens) / options.steps}


def worker(options: argparse.Namespace) -> None:
    """Run one side and print its measurements as the last line."""
    from posttrain.meter import peak_memory

    with tempfile.TemporaryDirectory() as folder:
        result = {"ours": run_ours, "trl": run_trl}[options.worker](options, folder)
    losses = [entry["loss"] for entry in result["history"] if "loss" in entry]
    counted = result["seconds"][_WARMUP:]
    print(json.dumps({"seconds": counted, "losses": losses, "tokens": result["tokens"], "peak": peak_memory()}))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--min-length", type=int, default=0)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing on both sides")
    parser.add_argument("--references", nargs="+", default=["live", "cached"])
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")
    parser.add_argument("--worker", choices=("ours", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--reference", default="live", help=argparse.SUPPRESS)
    parser.add_argument("--rows", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, side: str, reference: str, rows: str) -> dict:
    """One run of one side in a process of its own."""
    keep = ["--model", options.model, "--data", options.data, "--dtype", options.dtype]
    keep += [f"--{name}={vars(options)[name.replace('-', '_')]}" for name in ("batch", "max-length", "min-length", "steps")]
    keep += ["--checkpointing"] * options.checkpointing + ["--cpu"] * options.cpu
    command = [sys.executable, "-m", "benchmarks.step", *keep, "--worker", side, "--reference", reference, "--rows", rows]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    options = parse()
    if options.worker:
        return worker(options)
    import torch
    import trl

    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, trl {trl.__version__}, ", end=""
    )
    print(f"batch {options.batch}, max length {options.max_length}, {options.dtype}, checkpointing {options.checkpointing}\n")
    print("| reference | side | s/step | ratio | tokens/step | ratio | peak GiB | ratio | largest loss difference |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for reference in options.references:
            runs: dict[str, list[dict]] = {"trl": [], "ours": []}
            for _ in range(options.rounds):
                for side in runs:  # TRL first: it makes the token ids
                    runs[side].append(measure(options, side, reference, f"{folder}/rows.json"))
            table(reference, runs)
    return None


def table(reference: str, runs: dict[str, list[dict]]) -> None:
    """Two rows of the table, and the same as one line of JSON."""
    seconds = {side: statistics.median(s for run in runs[side] for s in run["seconds"]) for side in runs}
    peak = {side: max(run["peak"] for run in runs[side]) / 2**30 for side in runs}
    tokens = {side: runs[side][0]["tokens"] for side in runs}
    apart = max(abs(a - b) for a, b in zip(runs["trl"][0]["losses"], runs["ours"][0]["losses"], strict=True))
    for side in runs:
        ratios = [f"{value[side]:.2f} | {value[side] / value['trl']:.2f}" for value in (seconds, peak)]
        print(
            f"| {reference} | {side} | {ratios[0]} | {tokens[side]:.0f} | {tokens[side] / tokens['trl']:.2f} | "
            f"{ratios[1]} | {apart:.1e} |"
        )
    print(
        json.dumps({"reference": reference, "seconds": seconds, "peak_gib": peak, "tokens": tokens, "apart": apart}), flush=True
    )


if __name__ == "__main__":
    main()
