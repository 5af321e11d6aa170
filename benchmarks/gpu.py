"""Everything that is to be measured on one NVIDIA GPU, unattended: the tests of the fused kernel, then the benchmarks.

    python -m benchmarks.gpu --output gpu [--parts tests kernel-8b ...]

Each part is a process of its own with nine minutes. What it prints goes to `<output>/<part>.md` and is shown, its numbers go to
`<output>/<part>.json`. The status is 1 if a part failed; the others run all the same.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

LIMIT = 9 * 60
"""Seconds of a part."""

_KERNEL = ["benchmarks.kernel", "--device", "cuda", "--dtypes", "bfloat16", "--rounds", "10"]
_STEP = ["benchmarks.step", "--dtype", "bfloat16", "--cases", "dpo", "--max-length", "2048", "--batch", "4", "--rounds", "1"]
_MODELS = ("smollm2-135m", "qwen2.5-0.5b", "gemma-3-4b", "qwen3-8b")
_SCALING = ["benchmarks.scaling", "--model", "shape:llama-1b", "--processes", "1", "--bf16", "--steps", "6"]

PARTS: dict[str, list[list[str]]] = {
    "tests": [["pytest", "-q", "tests/fused_cases.py"], ["pytest", "-q", "tests/test_trees.py", "-k", "gpu"]],
    "kernel-8b": [[*_KERNEL, "--preset", "llama-3-8b", "--tokens", "1024", "4096", "16384", "32768"]],
    "kernel-152k": [[*_KERNEL, "--hidden", "4096", "--vocab", "152064", "--tokens", "16384", "--cases", "trained,frozen"]],
    "kernel-models": [
        [*_KERNEL, "--preset", model, "--tokens", "4096", "16384", "--cases", "trained,frozen"] for model in _MODELS
    ],
    "divergences": [
        [*_KERNEL, "--preset", "llama-3-8b", "--tokens", "16384", "--statistics", "forward_kl,reverse_kl,jsd"],
        [*_KERNEL, "--preset", "qwen2.5-0.5b", "--teacher-hidden", "2048", "--tokens", "4096", "--statistics", "jsd,akl,dackl"],
    ],
    "attention": [["benchmarks.attention", "--device", "cuda"]],
    "step-1b": [[*_STEP, "--model", "shape:llama-1b"]],
    "step-8b": [[*_STEP, "--model", "shape:llama-8b", "--lora", "16", "--checkpointing"]],
    "scaling": [[*_SCALING, "--attention", "sdpa", "--engines", "ddp", "zero2", "zero3", "fsdp2"]],
}
"""Name -> what `python -m` runs, one after the other."""


def run(part: str, output: Path) -> bool:
    """Run a part; whether it succeeded."""
    done, printed = True, []
    for number, arguments in enumerate(PARTS[part]):
        numbered = f"{part}-{number}" if number else part
        flag = {"pytest": "--junit-xml", "benchmarks.step": "--output"}.get(arguments[0], "--json")
        wanted = [flag, str(output / f"{numbered}.{'xml' if arguments[0] == 'pytest' else 'json'}")]
        command = [sys.executable, "-m", *arguments, *wanted]
        print(f"\n$ {' '.join(command[1:])}", flush=True)
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            for line in process.stdout:
                print(line, end="", flush=True)
                printed.append(line)
        done = done and process.returncode == 0
    (output / f"{part}.md").write_text("".join(printed))
    return done


def main() -> None:
    """Run the parts, each in a process that is ended when its time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="folder for tables and numbers")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if len(options.parts) == 1:
        sys.exit(0 if run(options.parts[0], options.output) else 1)
    failed = []
    for part in options.parts:
        command = [
            "timeout",
            str(LIMIT),
            sys.executable,
            "-m",
            "benchmarks.gpu",
            "--output",
            str(options.output),
            "--parts",
            part,
        ]
        failed += [part] if subprocess.run(command).returncode else []
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
