"""Preference methods side by side on a real model: what each learns on held-out pairs, and its cost beside plain DPO's.

    python -m benchmarks.methods --model <folder> --data <pairs.jsonl> [--methods dpo kto wpo ...] [--steps 40] [--cpu]

Pairs have columns prompt, chosen, rejected; methods on labelled rows get every pair as two rows, and as many pairs a step.
Every method trains in a process of its own, from the same model, on the same pairs, with a live reference where it reads one.
The table gives accuracy (labelled rows: the gap of the two mean rewards) on held-out pairs before and after, the median
seconds of a step, the peak of resident memory (on a GPU: of allocated), and the ratios of both to DPO's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from .isolated import Results, sweep
from .step import clock

METHODS = ("dpo", "kto", "wpo", "radpo", "sparsepo", "simpo", "orpo")
"""Those that are run unless others are named; dpo comes first, as what the others are compared with."""


def one(job: dict[str, Any]) -> dict[str, Any]:
    """Train one method; its metrics before and after, seconds of every step, peak memory."""
    from posttrain.meter import peak_memory
    from posttrain.recipe import load_run
    from posttrain.registry import find
    from posttrain.run import prepare, quiet_libraries
    from posttrain.stats import Labelled

    method, options = job["method"], argparse.Namespace(**job["options"])
    labelled = find(method).family is Labelled
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "objective": {"name": method, **options.settings.get(method, {})},
            "model": {"name": options.model},
            "data": {"name": options.data, "max_length": options.max_length, "eval_size": options.held_out, "unpair": labelled},
            "train": {
                "output_dir": folder,
                "max_steps": options.steps,
                "per_device_train_batch_size": options.batch * (2 if labelled else 1),
                "per_device_eval_batch_size": 8,
                "learning_rate": options.learning_rate,
                "lr_scheduler_type": "constant_with_warmup",
                "warmup_steps": 4,
                "logging_steps": 5,
                "save_strategy": "no",
                "eval_strategy": "no",
                "use_cpu": options.cpu,
                "seed": 1,
            },
        }
        recipe = Path(folder, "recipe.yaml")
        recipe.write_text(json.dumps(values))  # JSON is YAML
        run = load_run(recipe=recipe)
        quiet_libraries()
        trainer = prepare(run).trainer
        timer = clock()
        trainer.add_callback(timer)
        before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return {"before": before, "after": after, "seconds": timer.seconds, "peak": peak_memory(), "losses": losses}


def quality(metrics: dict) -> float:
    """Held-out accuracy; for labelled rows the gap of the mean rewards."""
    if "eval_rewards/accuracies" in metrics:
        return metrics["eval_rewards/accuracies"]
    return metrics["eval_rewards/desirable"] - metrics["eval_rewards/undesirable"]


def table(results: Results) -> str:
    """The results as Markdown; ratios are to the first."""
    lines = [
        "| method | held out before | after | eval loss before | after | s/step | x DPO | peak GiB | x DPO |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    (base, *_), *_ = results.values()
    base_seconds = statistics.median(base["seconds"])
    for method, (result, *_) in results.items():
        seconds, (before, after) = statistics.median(result["seconds"]), (result["before"], result["after"])
        lines.append(
            f"| {method} | {quality(before):.3f} | {quality(after):.3f} | {before['eval_loss']:.4f} | {after['eval_loss']:.4f} "
            f"| {seconds:.2f} | {seconds / base_seconds:.2f} | {result['peak'] / 2**30:.2f} "
            f"| {result['peak'] / base['peak']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--settings", type=json.loads, default={}, help='settings of methods, {"simpo": {"beta": 2}}')
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--held-out", type=int, default=128)
    parser.add_argument("--max-length", type=int, default=224)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--output", default="runs/benchmark-methods.json")
    options = parser.parse_args()
    jobs = ((method, {"method": method, "options": vars(options)}) for method in options.methods)
    sweep("benchmarks.methods", jobs, table, options.output)


if __name__ == "__main__":
    main()
