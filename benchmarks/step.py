"""One training step, side by side with TRL's trainers: seconds, positions, peak memory, and whether both compute the same.

    python -m benchmarks.step --model <folder> --data pairs.jsonl [--cases dpo dpo-cached kto kd group] [--steps 10]
    python -m benchmarks.step --model shape:llama-8b --lora 16 --dtype bfloat16 --cases dpo --steps 8    # no hub: untrained

Pairs are plain text with columns prompt, chosen, rejected; both sides get the same token ids in the same order. Cases: `dpo`
and `kto` beside a live reference (a second model) or a precomputed one (`-cached`); `kd`, forward KL of a student with half of
the model's layers from the model; `group`, a policy gradient on eight given completions of one prompt (GRPO with a ratio of 1:
nothing is sampled, on either side).
Each side runs in a process of its own (so that its peak memory is its own), the two alternate, and the table gives medians over
the counted steps of all rounds and ratios to TRL. A step is timed from the end of the one before. `apart` is the largest
relative difference of the losses, and of the norms of the gradient, of corresponding steps.
`--sides` and `--add` split a measurement over several commands: the results go to `--output`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .isolated import Results, sweep
from .machine import stamp
from .material import GROUP, Row, fewer_layers, load_model, rows_of

_WARMUP = 2

CASES = ("dpo", "dpo-cached", "kto", "kto-cached", "kd", "group")
SIDES = {"trl": "TRL", "ours": "posttrain", "separate": "posttrain, separate rows"}


def clock() -> Any:
    """A callback that notes, of each optimizer step, its seconds from the end of the one before (so with what is read, sampled
    and computed ahead of its first micro-batch) and the positions, padding included, that went through the trained model."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.positions: list[int] = []
            self.passing = 0

        def count(self, _module: Any, inputs: tuple, _output: Any) -> None:
            self.passing += inputs[0].numel()

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            model.get_input_embeddings().register_forward_hook(self.count)
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            now = time.perf_counter()
            self.seconds.append(now - self.start)
            self.positions.append(self.passing)
            self.start, self.passing = now, 0

    return Clock()


def train_arguments(folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """Arguments that both sides train with."""
    return {
        "output_dir": folder,
        "max_steps": options.warmup + options.steps,
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
        "train_sampling_strategy": "sequential",
        "seed": 1,
    }


def trainer_of(method: str, reference: str, rows: list[Row], folder: str, options: argparse.Namespace, layout: str) -> Any:
    """Our trainer."""
    from datasets import Dataset
    from transformers import TrainingArguments

    from posttrain.mismatch import early_roles
    from posttrain.models import add_adapter, attach
    from posttrain.reference import AdapterOff, CachedLogps, FrozenModel, Teachers
    from posttrain.registry import find
    from posttrain.stats import roles_of
    from posttrain.trainer import Trainer

    def frozen() -> FrozenModel:
        other = load_model(options)
        attach(other)
        return FrozenModel(other, options.model)

    from . import group  # registers a method of its own

    objective = find(group.NAME if method == "group" else method)
    policy, teacher = load_model(options), None
    if method == "kd":
        teacher = Teachers([frozen()], [1.0], policy.config.vocab_size)
        policy = fewer_layers(policy, policy.config.num_hidden_layers // 2)
    if options.lora:
        policy = add_adapter(policy, {"r": options.lora, "lora_alpha": 2 * options.lora}, seed=0)
    attach(policy)
    other = None
    if reference == "cached":
        other = CachedLogps(Path(folder), "benchmark", options.model)
        for _ in other.fill(policy, rows, [*roles_of(objective.family), *early_roles(objective)], "tree", options.batch):
            pass
        other.reload()
    elif method in ("dpo", "kto"):
        other = AdapterOff() if options.lora else frozen()
    arguments = train_arguments(folder, options)
    if method == "group":
        arguments["per_device_train_batch_size"] = 1
    return Trainer(
        objective=objective,
        config=objective.config(),
        model=policy,
        args=TrainingArguments(**arguments, remove_unused_columns=False),
        reference=teacher or other,
        layout=layout,
        starts_at_reference=method != "kd",
        train_dataset=Dataset.from_list(rows),
    )


def one(job: dict[str, Any]) -> dict[str, Any]:
    """Run one side of a case; what it took, and what it computed."""
    from posttrain.meter import peak_memory

    from . import trl_step

    options = argparse.Namespace(**job["options"])
    method, _, reference = job["case"].partition("-")
    steps = options.warmup + options.steps
    rows = rows_of(method, options, steps * (1 if method == "group" else options.batch))
    timer = clock()
    with tempfile.TemporaryDirectory() as folder:
        if job["side"] == "trl":
            trainer = trl_step.trainer(method, reference, rows, train_arguments(folder, options), options)
        else:
            layout = "separate" if job["side"] == "separate" else "auto"
            trainer = trainer_of(method, reference, rows, folder, options, layout)
        trainer.add_callback(timer)
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "seconds": timer.seconds[options.warmup :],
        "positions": timer.positions[options.warmup :],
        "losses": [float(entry["loss"]) for entry in logs],
        "norms": [float(entry["grad_norm"]) for entry in logs],
        "peak": peak_memory(),
    }


def apart(a: list[float], b: list[float]) -> float:
    """The largest difference of corresponding numbers, relative to the larger of the two and 1e-3."""
    return max(abs(x - y) / max(abs(x), abs(y), 1e-3) for x, y in zip(a, b, strict=False))


def table(results: Results) -> str:
    """The results as Markdown; a row of the results is `<case> <side>`."""
    lines = [
        "| case | side | s/step | x TRL | positions/step | x TRL | peak GiB | x TRL | loss apart | gradient norm apart |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    cases = dict.fromkeys(row.split()[0] for row in results)
    for case in cases:
        runs = {side: results[f"{case} {side}"] for side in SIDES if f"{case} {side}" in results}
        base = next(iter(runs))
        numbers = {
            side: [
                statistics.median(second for run in those for second in run["seconds"]),
                statistics.mean(those[0]["positions"]),
                max(run["peak"] for run in those) / 2**30,
            ]
            for side, those in runs.items()
        }
        for side, those in runs.items():
            cells = [
                f"{value:.{digits}f} | {value / least:.2f}"
                for value, least, digits in zip(numbers[side], numbers[base], (2, 0, 2), strict=True)
            ]
            beside = [apart(runs[base][0][key], those[0][key]) for key in ("losses", "norms")] if side != base else []
            ends = [f"{value:.1e}" for value in beside] or ["", ""]
            lines.append(f"| {case} | {SIDES[side]} | {' | '.join(cells)} | {ends[0]} | {ends[1]} |")
    return "\n".join(lines)


def parse(extra: Callable[[argparse.ArgumentParser], Any] | None = None) -> argparse.Namespace:
    """The options of the command; `extra` adds more to them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, hub id, or shape:<name>")
    parser.add_argument("--data")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--sides", nargs="+", default=["trl", "ours"], choices=list(SIDES))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--min-length", type=int, default=0)
    parser.add_argument("--group-prompt", type=int, default=256)
    parser.add_argument("--group-completion", type=int, default=32)
    parser.add_argument("--warmup", type=int, default=_WARMUP)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--lora", type=int, default=0, help="rank of an adapter on both sides; 0 trains all")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing on both sides")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")
    parser.add_argument("--output", "--json", default="runs/benchmark-step.json")
    parser.add_argument("--add", action="store_true", help="add to the results in the output file")
    if extra is not None:
        extra(parser)
    return parser.parse_args()


def main() -> None:
    options = parse()
    print(
        f"{stamp('trl')}; {options.model}, batch {options.batch} (group: {GROUP} completions of one prompt), "
        f"max length {options.max_length}, {options.dtype}, LoRA {options.lora}, checkpointing {options.checkpointing}\n"
    )
    told = vars(options)

    def jobs() -> Iterator[tuple[str, dict[str, Any]]]:
        for case in options.cases:
            for _ in range(options.rounds):
                for side in options.sides:
                    yield f"{case} {side}", {"case": case, "side": side, "options": told}

    results = sweep("benchmarks.step", jobs(), table, options.output, add=options.add)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
