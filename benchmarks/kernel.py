"""Log-probs of target tokens and their gradient, side by side: naive log-softmax, TRL's ChunkedLogProbFunction, and our kernel.

    python -m benchmarks.kernel [--tokens 1024] [--hidden 576] [--vocab 49152] [--dtypes float32,bfloat16] [--rounds 3]

Cases: `trained` (gradients to hidden states and weight), `frozen` (to hidden states only), `forward` (no gradient).
Every measurement runs in a process of its own, which makes its inputs, does one call for the peak memory (high water minus
what was held before the call, the results included) and repeats the call for the time; the peers alternate over the rounds.
The table gives medians, and ratios to the naive form. All peers get the same inputs; their results are compared, and a
difference beyond what the dtype explains ends the run with status 1.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

CASES = ("trained", "frozen", "forward")
PEERS = {
    "naive": "log_softmax + gather",
    "naive32": "the same, float32 products",
    "trl": "TRL ChunkedLogProbFunction",
    "ours": "posttrain_kernels",
}
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
"""Relative, between two peers: bfloat16 logits are wrong in the third digit."""


def peer(name: str) -> Callable:
    """(x, weight, target) -> [N] log-probs."""
    import torch

    def naive(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (x @ weight.T).float().log_softmax(-1).gather(1, target[:, None]).squeeze(1)

    def naive32(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return naive(x.float(), weight.float(), target)

    def trl(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        return ChunkedLogProbFunction.apply(x, weight, None, target, 1.0, 32768, None, 1.0, ())[0]

    def ours(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        from posttrain_kernels import Head, head_stats

        return head_stats(Head(x, weight), ["logp"], target=target)["logp"]

    return {"naive": naive, "naive32": naive32, "trl": trl, "ours": ours}[name]


def held() -> int:
    """Bytes this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def worker(options: argparse.Namespace) -> None:
    """Measure one peer in one case; the last line printed is the result."""
    import torch

    torch.set_num_threads(options.threads or torch.get_num_threads())
    torch.manual_seed(0)
    cuda = torch.cuda.is_available()
    form = {"dtype": getattr(torch, options.dtype), "device": "cuda" if cuda else "cpu"}
    x = torch.empty(options.tokens, options.hidden, **form).normal_().requires_grad_(options.case != "forward")
    weight = torch.empty(options.vocab, options.hidden, **form).normal_(std=0.1).requires_grad_(options.case == "trained")
    target = torch.randint(0, options.vocab, (options.tokens,), device=x.device)
    upstream = torch.randn(options.tokens, device=x.device)
    leaves = [tensor for tensor in (x, weight) if tensor.requires_grad]
    logps = peer(options.peer)
    logps(x[:8].detach(), weight.detach(), target[:8])  # imports, thread pools

    def call() -> tuple[torch.Tensor, list[torch.Tensor]]:
        out = logps(x, weight, target)
        gradients = list(torch.autograd.grad(out, leaves, upstream.to(out.dtype))) if leaves else []
        if cuda:
            torch.cuda.synchronize()
        return out.detach(), gradients

    before = torch.cuda.memory_allocated() if cuda else held()
    out, gradients = call()
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    numbers = [out.double().sum(), out.double().norm(), *(g.double().norm() for g in gradients), *(g[0, 0] for g in gradients)]
    numbers = [float(number) for number in numbers]
    del out, gradients
    wall, cpu, deadline = [], [], time.perf_counter() + options.seconds
    while not wall or time.perf_counter() < deadline:
        start = time.perf_counter(), time.process_time()
        call()
        wall.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
    print(json.dumps({"wall": wall, "cpu": cpu, "peak": peak - before, "numbers": numbers}))


def measure(options: argparse.Namespace, dtype: str, case: str, name: str) -> dict:
    """One measurement in a fresh process."""
    shape = [f"--{key}={getattr(options, key)}" for key in ("tokens", "hidden", "vocab", "seconds", "threads")]
    command = [sys.executable, "-m", "benchmarks.kernel", f"--peer={name}", f"--case={case}", f"--dtype={dtype}", *shape]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(options: argparse.Namespace, dtype: str, case: str) -> tuple[list[dict], bool]:
    """Rows of the table for one case, and whether the peers computed the same numbers."""
    names = [name for name in options.peers.split(",") if name != "naive32" or dtype != "float32"]
    rounds = [{name: measure(options, dtype, case, name) for name in names} for _ in range(options.rounds)]
    rows, baseline = [], None
    for name in names:
        runs = [one[name] for one in rounds]
        row = {key: statistics.median(second for run in runs for second in run[key]) for key in ("wall", "cpu")}
        row |= {"peak": statistics.median(run["peak"] for run in runs), "numbers": runs[0]["numbers"]}
        baseline = baseline or row
        ratios = {f"{key} ratio": row[key] / baseline[key] for key in ("wall", "cpu", "peak")}
        rows.append({"dtype": dtype, "case": case, "peer": name, **row, **ratios})
    first = rows[0]["numbers"]
    agree = all(
        abs(a - b) <= TOLERANCE[dtype] * max(1, abs(a)) for row in rows for a, b in zip(first, row["numbers"], strict=True)
    )
    return rows, agree


def header(options: argparse.Namespace) -> str:
    """What ran where, and the head of the Markdown table."""
    from importlib.metadata import version

    import torch

    threads = options.threads or torch.get_num_threads()
    device = f"CPU {platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {threads} threads"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return (
        f"N = {options.tokens}, H = {options.hidden}, V = {options.vocab}; "
        f"{device}; torch {torch.__version__}, trl {version('trl')}; medians of {options.rounds} alternating rounds.\n\n"
        "| dtype | case | form | seconds | x naive | CPU seconds | x naive | peak MiB | x naive |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )


def line(row: dict) -> str:
    """A line of the table."""
    cells = [row["dtype"], row["case"], PEERS[row["peer"]]]
    for key, unit, digits in (("wall", 1, 2), ("cpu", 1, 2), ("peak", 2**20, 0)):
        cells += [f"{row[key] / unit:.{digits}f}", f"{row[f'{key} ratio']:.2f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--peers", default=",".join(PEERS), help="the first is what ratios are taken to")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5, help="how long one measurement repeats the call")
    parser.add_argument("--threads", type=int, default=0, help="on a CPU; 0 is what torch chooses")
    parser.add_argument("--json", help="also write the rows, with every number, to this file")
    for name in ("peer", "case", "dtype"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        worker(options)
        return
    print(header(options), flush=True)
    rows, differ = [], []
    for dtype in options.dtypes.split(","):
        for case in options.cases.split(","):
            found, agree = compare(options, dtype, case)
            print("\n".join(line(row) for row in found), flush=True)
            rows += found
            differ += [] if agree else [f"{dtype} {case}"]
    if options.json:
        Path(options.json).write_text(json.dumps({"options": vars(options), "rows": rows}, indent=1))
    if differ:
        sys.exit(f"the forms disagree: {', '.join(differ)}")


if __name__ == "__main__":
    main()
