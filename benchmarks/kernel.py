"""Statistics of vocabulary heads and their gradient, side by side: plain torch on all logits, TRL, Liger, CCE, and ours.

    python -m benchmarks.kernel [--statistics logp] [--tokens 1024] [--preset smollm2-135m] [--rounds 3]
    python -m benchmarks.kernel --statistics forward_kl,reverse_kl,jsd,akl,dackl [--teacher-hidden 960] [--vocab 151936]

Statistics: `logp` of target tokens (the upstream gradients are random); of a student and a teacher head `forward_kl`,
`reverse_kl`, `jsd` (the generalised Jensen-Shannon divergence at 0.5), and the losses of the objectives `akl` and `dackl` (with
a fixed window), which all logits give by sorting each token's row (the upstream gradients are 1, those of a sum over tokens).
`ours` takes gradients in the backward, `eager` in the forward; on a GPU both are `fused`, and `chunked` is the same loops by
torch operations.
Cases: `trained` (gradients to the student's hidden states and weight), `frozen` (to its hidden states), `forward` (none).
All forms run in one process on the same tensors, one after the other in every round; the table gives medians over the rounds,
and ratios to the first form. Peak memory is what a call adds at most (results included) to what was held before. Numbers that
differ by more than the dtype explains end the run with status 1.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from .forms import FORMS, Form, form
from .machine import stamp

STATISTICS = ("logp", "forward_kl", "reverse_kl", "jsd", "akl", "dackl")
CASES = ("trained", "frozen", "forward")

PRESETS = {
    "smollm2-135m": (576, 49152),
    "qwen2.5-0.5b": (896, 151936),
    "gemma-3-4b": (2560, 262208),
    "llama-3-8b": (4096, 128256),
    "qwen3-8b": (4096, 151936),
}
"""Name -> (H, V)."""

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
"""Relative, between two forms: bfloat16 logits are wrong in the third digit."""


@dataclass
class Measured:
    """What the calls of one form took."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)
    """Sums and norms of the results of the first call."""

    failed: str = ""
    """Why there are none."""


def make(options: argparse.Namespace, statistic: str, dtype: str, case: str, tokens: int) -> tuple[list[Tensor], Tensor]:
    """The inputs of a form, and the upstream gradient of its values."""
    torch.manual_seed(0)
    kind = {"dtype": getattr(torch, dtype), "device": options.device}

    def head(width: int) -> tuple[Tensor, Tensor]:
        x = torch.empty(tokens, width, **kind).normal_()
        return x, torch.empty(options.vocab, width, **kind).normal_(std=options.spread / width**0.5)

    x, weight = head(options.hidden)
    x.requires_grad_(case != "forward")
    weight.requires_grad_(case == "trained")
    if statistic == "logp":
        target = torch.randint(0, options.vocab, (tokens,), device=options.device)
        return [x, weight, target], torch.randn(tokens, device=options.device)
    return [x, weight, *head(options.teacher_hidden or options.hidden)], torch.ones(tokens, device=options.device)


def call(values: Form, inputs: list[Tensor], upstream: Tensor, n: int) -> tuple[Tensor, list[Tensor]]:
    """Values and gradients for the first n tokens."""
    x, weight, other, *rest = inputs
    leaves = [tensor for tensor in (x, weight) if tensor.requires_grad]
    out = values(x[:n], weight, other[:n], *rest)
    gradients = list(torch.autograd.grad(out, leaves, upstream[:n].to(out.dtype))) if leaves else []
    if x.is_cuda:
        torch.cuda.synchronize()
    return out.detach(), gradients


class Peak:
    """Bytes that are held at most while it is open, beyond those held before; of this process, or of its GPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def __enter__(self) -> Peak:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system, so that using it again counts
            Path("/proc/self/clear_refs").write_text("5")  # the high water starts at what is held now
            self.before = _status("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        self.bytes = (torch.cuda.max_memory_allocated() if self.cuda else _status("VmHWM")) - self.before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def measure(values: Form, inputs: list[Tensor], upstream: Tensor, device: str, into: Measured) -> None:
    """One call, added to what the form took so far; on a GPU one more before the first, for the memory alone.

    A GPU's allocator takes as long to get memory from the device as to compute, so the calls that are timed find it warm.
    """
    apart = device == "cuda"
    if apart and not into.peak:
        with Peak(device) as peak:
            call(values, inputs, upstream, len(upstream))
        into.peak.append(peak.bytes)
    with nullcontext() if apart else Peak(device) as peak:
        start = time.perf_counter(), time.process_time()
        out, gradients = call(values, inputs, upstream, len(upstream))
        into.wall.append(time.perf_counter() - start[0])
        into.cpu.append(time.process_time() - start[1])
    if not apart:
        into.peak.append(peak.bytes)
    if not into.numbers:
        found = [out.double().sum(), *(g.double().norm() for g in gradients), *(g[0, 0] for g in gradients)]
        into.numbers = [float(number) for number in found]


def compare(options: argparse.Namespace, statistic: str, dtype: str, case: str, tokens: int) -> tuple[list[dict], bool]:
    """Rows of the table for one case, and whether the forms computed the same numbers."""
    forms = {name: form(name, statistic, dtype, case, options.device) for name in options.peers.split(",")}
    forms = {name: values for name, values in forms.items() if values is not None}
    inputs, upstream = make(options, statistic, dtype, case, tokens)
    took = {name: Measured() for name in forms}
    for turn in range(options.rounds + 1):
        for name, values in forms.items():
            if took[name].failed:
                continue
            try:
                if turn == 0:
                    call(values, inputs, upstream, min(tokens, 64))  # imports, thread pools, compilation
                else:
                    measure(values, inputs, upstream, options.device, took[name])
            except (torch.OutOfMemoryError, MemoryError):
                took[name].failed = "out of memory"
    rows, base = [], None
    for name, its in took.items():
        row = {"statistic": statistic, "dtype": dtype, "case": case, "tokens": tokens, "form": name, "failed": its.failed}
        if not its.failed:
            row |= {key: statistics.median(vars(its)[key]) for key in ("wall", "cpu", "peak")}
            base = base or row
            row |= {f"{key} ratio": row[key] / base[key] for key in ("wall", "cpu", "peak")} | {"numbers": its.numbers}
        rows.append(row)
    first = base["numbers"] if base else []
    agree = all(
        abs(a - b) <= TOLERANCE[dtype] * max(1, abs(a))
        for row in rows
        if "numbers" in row
        for a, b in zip(first, row["numbers"], strict=True)
    )
    return rows, agree


def header(options: argparse.Namespace) -> str:
    """What ran where, and the head of the Markdown table."""
    threads = "" if options.device == "cuda" else f", {torch.get_num_threads()} threads"
    return (
        f"{stamp('trl', 'liger-kernel', 'cut-cross-entropy')}{threads}; H = {options.hidden}, H of the teacher = "
        f"{options.teacher_hidden or options.hidden}, V = {options.vocab}; medians of {options.rounds} alternating rounds.\n\n"
        "| N | statistic | dtype | case | form | seconds | ratio | CPU seconds | ratio | peak MiB | ratio |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|"
    )


def line(row: dict) -> str:
    """A line of the table."""
    cells = [str(row["tokens"]), row["statistic"], row["dtype"], row["case"], FORMS[row["form"]]]
    if row["failed"]:
        return f"| {' | '.join(cells)} | {row['failed']} | | | | | |"
    digits = 2 if row["wall"] >= 0.2 else 4
    for key, unit, places in (("wall", 1, digits), ("cpu", 1, digits), ("peak", 2**20, 0)):
        cells += [f"{row[key] / unit:.{places}f}", f"{row[f'{key} ratio']:.2f}"]
    return f"| {' | '.join(cells)} |"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--statistics", default="logp", help=f"of {','.join(STATISTICS)}")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024])
    parser.add_argument("--preset", choices=PRESETS, help="hidden size and vocabulary of a model")
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--teacher-hidden", type=int, default=0, help="0: as the student")
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--spread", type=float, default=2.4, help="standard deviation of the logits")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--peers", default=",".join(FORMS), help="the first is what ratios are taken to")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="on a CPU; 0 is what torch chooses")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="also write the rows, with every number, to this file")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU")
    if options.preset:
        options.hidden, options.vocab = PRESETS[options.preset]
    return options


def main() -> None:
    """Run all cases and print the table."""
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(header(options), flush=True)
    rows, differ = [], []
    cases = product(*(given.split(",") for given in (options.statistics, options.dtypes, options.cases)), options.tokens)
    for statistic, dtype, case, tokens in cases:
        found, agree = compare(options, statistic, dtype, case, tokens)
        print("\n".join(line(row) for row in found), flush=True)
        rows += found
        differ += [] if agree else [f"{statistic} {dtype} {case}"]
        if options.json:
            Path(options.json).write_text(json.dumps({"options": vars(options), "rows": rows}, indent=1))
    if differ:
        sys.exit(f"the forms disagree: {', '.join(differ)}")


if __name__ == "__main__":
    main()
