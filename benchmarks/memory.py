"""Peak memory that `posttrain check` predicts, beside what runs take.

    python -m benchmarks.memory --model <folder> --pairs pairs.jsonl --labelled labelled.jsonl --answers answers.jsonl

Every combination is a short run in a process of its own. Measured is what the metrics call `memory_gib`: on a CPU the largest
resident size of the process, libraries included; on a GPU what torch has allocated at most. `--teacher` is another model for
the distillations; the default is the model itself.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile

from posttrain import memory, references, teachers
from posttrain.meter import peak_memory
from posttrain.run import execute, load_run


def combinations(options: argparse.Namespace) -> dict[str, list[str]]:
    """Name -> the words of a run."""
    pairs, answers = [f"data={options.pairs}"], [f"data={options.answers}", f"teacher={options.teacher or options.model}"]
    return {
        "dpo, frozen reference": ["dpo", *pairs],
        "dpo, LoRA, reference with the adapter off": ["dpo", *pairs, "model.peft.r=16"],
        "dpo, frozen reference, gradient checkpointing": ["dpo", *pairs, "train.gradient_checkpointing=true"],
        "kto": ["kto", f"data={options.labelled}"],
        "sparsepo": ["sparsepo", *pairs],
        "kd": ["kd", *answers],
        "akl": ["akl", *answers],
    }


def measured(words: list[str], options: argparse.Namespace) -> None:
    """Train, and print what was predicted by purpose and what was measured, in bytes."""
    with tempfile.TemporaryDirectory() as scratch:
        settings = {
            "model": options.model,
            "data.max_length": options.max_length,
            "train.output_dir": scratch,
            "train.max_steps": options.steps,
            "train.per_device_train_batch_size": options.batch,
            "train.gradient_accumulation_steps": options.accumulation,
            "train.save_strategy": "no",
            "train.bf16": str(options.bf16).lower(),
            "train.optim": "adamw_torch",
        }
        objective, *more = words
        done = execute(load_run(objective, overrides=[*(f"{key}={value}" for key, value in settings.items()), *more]))
        shape = memory.shape(
            done.run,
            done.args,
            done.model,
            done.data.train,
            references.kind_of(done.run),
            teachers.held(done.trainer.reference),
        )
        print(json.dumps([memory.predict(shape), peak_memory()]))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--teacher")
    parser.add_argument("--pairs", required=True, help="preferences")
    parser.add_argument("--labelled", required=True, help="completions with a label")
    parser.add_argument("--answers", required=True, help="prompts and completions")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--only", nargs="+", help="parts of the names of combinations")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    known = combinations(options)
    if options.run is not None:
        return measured(known[options.run], options)
    print("| run | predicted GiB | measured GiB | ratio | predicted by purpose |")
    print("|---|---|---|---|---|")
    for name in known:
        if options.only and not any(part in name for part in options.only):
            continue
        command = [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:], "--run", name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name}: {done.stderr[-3000:]}")
        predicted, peak = json.loads(done.stdout.splitlines()[-1])
        total = sum(predicted.values())
        parts = ", ".join(f"{purpose} {size / 2**30:.2f}" for purpose, size in predicted.items() if size)
        print(f"| {name} | {total / 2**30:.2f} | {peak / 2**30:.2f} | {total / peak:.2f} | {parts} |", flush=True)


if __name__ == "__main__":
    main()
