"""One process against several, for all objectives and engine: `python tests/exactness.py [NAME...] [--engines ddp zero2 zero3]`
prints the table.

Ten optimizer steps of 4 rows over epochs of 17, so that the last step of an epoch has one row: one process then has no rows, or
only micro-batches without rows, and still takes part. Each engine splits the same rows in another way. What is compared: the
loss of every step, loss and metrics on 7 held-out rows, and all parameters, with those of one process without any engine.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from trajectory import PROBE, ROWS_A_STEP, Trajectory, objective_named, train, varied

from posttrain.registry import names
from posttrain.shipped import launch_config

STEPS = 10
ROWS = 17
PROCESSES = 2

VARIANTS = [f"{name}/{variant}" for name in ("dpo", "tdpo", "kd") for variant in ("adapter", "head", "tied")]
"""The policy with its adapter off as the reference, the adapter also on the output head, or tied embeddings, for what reads the
reference in different ways."""


@dataclass(frozen=True)
class Engine:
    """How several processes train, and how exactly."""

    batch: int
    """Rows of a micro-batch; a step of a process has ROWS_A_STEP / PROCESSES rows."""

    dtype: torch.dtype
    """Of the models and of those of the one process. DeepSpeed keeps its master weights in float32."""

    tolerance: float
    """Largest difference allowed, relative to 1 or to the number itself."""


ENGINES = {
    "ddp": Engine(batch=1, dtype=torch.float64, tolerance=1e-6),
    "zero2": Engine(batch=2, dtype=torch.float32, tolerance=2e-5),
    "zero3": Engine(batch=1, dtype=torch.float32, tolerance=2e-5),
}
"""In float64 what is left are float32 sums of losses in transformers; in float32 ten steps of Adam have amplified rounding."""


def every_name() -> list[str]:
    """What the table has: all objectives, the probe of the reduction, variants."""
    return [*names(), PROBE.name, *VARIANTS]


def alone(name: str, engine: Engine) -> Trajectory:
    """The training of one process; its micro-batches are larger than the engine's unless the objective depends on them."""
    return _alone(name, engine.batch if objective_named(varied(name)[0]).coupled else ROWS_A_STEP, engine.dtype)


@functools.cache
def _alone(name: str, batch: int, dtype: torch.dtype) -> Trajectory:
    objective, settings = varied(name)
    split = {"batch": batch, "accumulation": ROWS_A_STEP // batch, "steps": STEPS, "rows": ROWS}
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        return train(objective, Path(scratch), **split, dtype=dtype, **settings)


def compile_communication(environment: dict[str, str]) -> None:
    """What DeepSpeed compiles for processes on one machine at its first use: by one process, before two want it at once.

    A compilation that was killed leaves a lock in torch's folder of extensions, for which every other one waits in vain.
    """
    build = "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load()"
    subprocess.run([sys.executable, "-c", build], capture_output=True, check=True, env=environment, timeout=600)


def together(engine: str, chosen: list[str], folder: Path) -> dict[str, Trajectory]:
    """The trainings of two processes of `accelerate launch` with the configuration that is shipped, started once."""
    settings = ENGINES[engine]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    if engine.startswith("zero"):
        compile_communication(environment)
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(launch_config(engine))]
    launch += ["--num_processes", str(PROCESSES), "--main_process_port", "0"]
    program = [str(Path(__file__).with_name("trajectory.py")), str(folder), *chosen, "--steps", str(STEPS), "--rows", str(ROWS)]
    program += ["--batch", str(settings.batch), "--dtype", str(settings.dtype).removeprefix("torch.")]
    done = subprocess.run([sys.executable, *launch, *program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return {name: Trajectory(**torch.load(folder / f"{name.replace('/', '-')}.pt")) for name in chosen}


def difference(one: Trajectory, other: Trajectory) -> float:
    """The largest difference in losses, evaluation and parameters, relative where the number is larger than 1."""
    assert len(one.losses) == len(other.losses) == STEPS and one.evaluated.keys() == other.evaluated.keys()
    sides = [torch.tensor([*side.losses, *side.evaluated.values()], dtype=torch.float64) for side in (one, other)]
    pairs = [sides, [one.parameters.double(), other.parameters.double()]]
    return max(((a - b).abs() / b.abs().clamp(min=1)).max().item() for a, b in pairs)


def differences(engine: str, chosen: list[str]) -> dict[str, float]:
    """Name -> the largest difference between one process and several."""
    with tempfile.TemporaryDirectory() as scratch:
        trained = together(engine, chosen, Path(scratch))
    return {name: difference(trajectory, alone(name, ENGINES[engine])) for name, trajectory in trained.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=every_name())
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    options = parser.parse_args()
    columns = {engine: differences(engine, options.names) for engine in options.engines}
    head = [f"{e}, {str(ENGINES[e].dtype).removeprefix('torch.')} ({ENGINES[e].tolerance:.0e})" for e in columns]
    print("| largest difference from one process (allowed) |", " | ".join(head), "|")
    print("|---|" + "---|" * len(columns))
    for name in options.names:
        print(f"| {name} |", " | ".join(f"{column[name]:.1e}" for column in columns.values()), "|")
    wrong = [(e, n) for e, column in columns.items() for n, value in column.items() if not value <= ENGINES[e].tolerance]
    sys.exit(f"not exact: {wrong}" if wrong else 0)


if __name__ == "__main__":
    main()
