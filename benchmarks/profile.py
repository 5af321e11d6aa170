"""Where the time of one of our training steps goes: attention, MLP, head, optimizer, data, by torch's profiler.

    python -m benchmarks.profile --model <folder> --data pairs.jsonl [--case dpo] [--cpu]

The step after `--warmup` others is recorded. Forward time is that between a module's first and last operation; an operation of
the backward counts where the operation of the forward stands that it belongs to, which the profiler tells by sequence numbers.
Seconds are wall time of operations that no other contains, so parts add up to the step but for what Python does in between.
Products are `mm`, `addmm`, `bmm` and their like, whose rate shows how far the step is from the speed of the machine's matrix
product, which is measured beside it.
"""

from __future__ import annotations

import argparse
import bisect
import json
import tempfile
import time
from collections import defaultdict
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import TrainerCallback

from . import step
from .machine import stamp
from .material import GROUP, rows_of

PARTS = ("attention", "mlp", "head", "rest of the model", "loss and checks", "optimizer", "clipping", "data")
_MARK = "part: "
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


def mark(module: torch.nn.Module, part: str) -> None:
    """Record when a module's forward runs, as a range of this name."""
    open_ranges = []

    def enter(*args: Any) -> None:
        open_ranges.append(record_function(f"{_MARK}{part}"))
        open_ranges[-1].__enter__()

    def leave(*args: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def mark_model(model: torch.nn.Module) -> None:
    """Mark the parts of a causal language model."""
    mark(model, "rest of the model")
    mark(model.get_output_embeddings(), "head")
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last in ("self_attn", "attn", "attention"):
            mark(module, "attention")
        elif last == "mlp":
            mark(module, "mlp")


def outermost(events: list[Any]) -> list[Any]:
    """The events that no other one of these contains, by start."""
    found, end = [], -1.0
    for event in sorted(events, key=lambda one: (one.time_range.start, -one.time_range.end)):
        if event.time_range.start >= end:
            found.append(event)
            end = event.time_range.end
    return found


class Ranges:
    """Looks up the innermost marked range around a time."""

    def __init__(self, events: list[Any]) -> None:
        marked = [event for event in events if event.name.startswith(_MARK)]
        self.spans = sorted((e.time_range.start, e.time_range.end, e.name.removeprefix(_MARK)) for e in marked)
        self.starts = [span[0] for span in self.spans]

    def at(self, when: float) -> str | None:
        """The name of the range; None outside of all."""
        for index in range(bisect.bisect_right(self.starts, when) - 1, -1, -1):
            start, end, name = self.spans[index]
            if start <= when < end:
                return name
            if name == "rest of the model":  # the outermost one: what began before it does not reach here
                return None
        return None


def split(events: list[Any]) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Part -> phase -> seconds; and of the products seconds and operations."""
    ranges = Ranges(events)
    part_of = {}
    for event in events:
        if event.scope == 0 and event.sequence_nr >= 0 and not event.name.startswith(_MARK):
            part_of.setdefault(event.sequence_nr, ranges.at(event.time_range.start))
    seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    operations = [event for event in events if not event.name.startswith((_MARK, "ProfilerStep", "autograd::engine"))]
    for event in outermost(operations):
        took = event.time_range.elapsed_us() / 1e6
        if event.scope == 1:
            seconds[part_of.get(event.sequence_nr) or "loss and checks"]["backward"] += took
        elif event.name.startswith("Optimizer.step"):
            seconds["optimizer"]["step"] += took
        elif event.name.startswith("enumerate(DataLoader"):
            seconds["data"]["step"] += took
        elif "_foreach_" in event.name or "clip_grad" in event.name or "linalg_vector_norm" in event.name:
            seconds["clipping"]["step"] += took
        else:
            seconds[ranges.at(event.time_range.start) or "loss and checks"]["forward"] += took
    products = outermost([event for event in events if event.name in _PRODUCTS])
    return seconds, {
        "seconds": sum(event.time_range.elapsed_us() for event in products) / 1e6,
        "operations": float(sum(event.flops for event in products)),
    }


def peak_rate(size: int = 2048) -> float:
    """Operations a second of a float32 product of square matrices, the best of some."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def record(options: argparse.Namespace) -> tuple[dict[str, dict[str, float]], dict[str, float], float]:
    """The split of one step, its products, and its seconds."""
    method, _, reference = options.case.partition("-")
    rows = rows_of(method, options, (options.warmup + 1) * (1 if method == "group" else options.batch))
    with tempfile.TemporaryDirectory() as folder:
        trainer = step.trainer_of(method, reference, rows, folder, options, "auto")
        mark_model(trainer.model)
        if trainer.reference is not None and not reference:
            mark_model(trainer.reference.body(trainer.model))
        recorder = Recorder(options.warmup)
        trainer.add_callback(recorder)
        trainer.train()
    return *split(recorder.profiler.events()), recorder.seconds


class Recorder(TrainerCallback):
    """Records the step after so many others, from the end of the one before."""

    def __init__(self, after: int) -> None:
        self.after, self.seconds = after, 0.0
        self.profiler = profile(activities=[ProfilerActivity.CPU], with_flops=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.after:
            self.profiler.start()
            self.seconds = time.perf_counter()
        elif state.global_step == self.after + 1:
            self.seconds = time.perf_counter() - self.seconds
            self.profiler.stop()


def main() -> None:
    """Record and print."""
    options = step.parse(lambda parser: parser.add_argument("--case", choices=step.CASES, default="dpo"))
    options.steps = 1
    print(f"{stamp()}; {options.case}, batch {options.batch}, {torch.get_num_threads()} threads; groups have {GROUP}\n")
    seconds, products, whole = record(options)
    print("| part | forward | backward | other | share |\n|---|---|---|---|---|")
    for part in PARTS:
        phases = seconds.get(part, {})
        cells = [f"{phases[phase]:.2f}" if phase in phases else "" for phase in ("forward", "backward", "step")]
        print(f"| {part} | {' | '.join(cells)} | {sum(phases.values()) / whole:.0%} |")
    known = sum(sum(phases.values()) for phases in seconds.values())
    print(f"| between operations | | | {whole - known:.2f} | {(whole - known) / whole:.0%} |")
    rate, peak = products["operations"] / products["seconds"], peak_rate()
    took = products["seconds"]
    print(f"\n{whole:.2f} s; products {took:.2f} s ({took / whole:.0%}) at {rate / 1e9:.0f} GFLOP/s, ", end="")
    print(f"a large square one alone {peak / 1e9:.0f}")
    print(json.dumps({"seconds": seconds, "products": products, "whole": whole, "peak_rate": peak}))


if __name__ == "__main__":
    main()
