"""Statistics of vocabulary heads and their gradient, side by side: plain torch on all logits, TRL's kernels, and ours.

    python -m benchmarks.kernel [--statistics logp] [--tokens 1024] [--hidden 576] [--vocab 49152] [--rounds 3]
    python -m benchmarks.kernel --statistics forward_kl,reverse_kl,jsd,akl,dackl [--teacher-hidden 960] [--vocab 151936]

Statistics: `logp` of target tokens (the upstream gradients are random); of a student and a teacher head `forward_kl`,
`reverse_kl`, `jsd` (the generalised Jensen-Shannon divergence at 0.5), and the losses of the objectives `akl` and `dackl` (with
a fixed window), which all logits give by sorting each token's row (the upstream gradients are 1, those of a sum over tokens).
`ours` takes gradients in the backward, `eager` in the forward.
Cases: `trained` (gradients to the student's hidden states and weight), `frozen` (to its hidden states), `forward` (none).
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
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

STATISTICS = ("logp", "forward_kl", "reverse_kl", "jsd", "akl", "dackl")
CASES = ("trained", "frozen", "forward")
PEERS = {
    "naive": "all logits",
    "naive32": "the same, float32 products",
    "trl": "TRL",
    "ours": "posttrain_kernels",
    "eager": "posttrain_kernels, eager",
}
SHAPE = ("tokens", "hidden", "teacher_hidden", "vocab", "spread", "seconds", "threads")
"""Options that every measurement gets."""

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
"""Relative, between two peers: bfloat16 logits are wrong in the third digit."""


def there_is(peer: str, statistic: str, dtype: str, case: str) -> bool:
    """Whether a form computes a statistic, and is not another one in disguise."""
    match peer:
        case "naive32":
            return dtype != "float32"
        case "trl":
            return statistic not in ("akl", "dackl")
        case "eager":
            return statistic not in ("logp", "dackl") and case == "trained"
        case _:
            return True


def peer_of_logp(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(x, weight, target) -> [N] log-probs."""

    def naive(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return (x @ weight.T).float().log_softmax(-1).gather(1, target[:, None]).squeeze(1)

    def naive32(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return naive(x.float(), weight.float(), target)

    def trl(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        return ChunkedLogProbFunction.apply(x, weight, None, target, 1.0, 32768, None, 1.0, ())[0]

    def ours(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        from posttrain_kernels import Head, head_stats

        return head_stats(Head(x, weight), ["logp"], target=target)["logp"]

    return {"naive": naive, "naive32": naive32, "trl": trl, "ours": ours}[name]


def adaptive(lp: Tensor, lq: Tensor) -> Tensor:
    """[n] AKL by its definition: forward and reverse KL, weighted by how far the models are apart on the teacher's head."""
    import torch

    q = lq.exp()
    with torch.no_grad():
        ordered, order = q.sort(-1, descending=True)
        inside = ordered.cumsum(-1) - ordered < 0.5
        gap = (lp.exp() - q).abs_()
        share = (gap.gather(1, order) * inside).sum(-1) / gap.sum(-1)
    return share * (q * (lq - lp)).sum(-1) + (1 - share) * (lp.exp() * (lp - lq)).sum(-1)


def windowed(lp: Tensor, lq: Tensor) -> Tensor:
    """[n] DAC-KL with a fixed window, from the log-probs [n, k] of the teacher's likeliest items in both models."""
    from posttrain.objectives.distillation.dackl import log_gates

    gates = log_gates(lq, lq.new_tensor([[0.05, 0.95]]), 0.05)
    p, q = (lq + gates).log_softmax(-1), (lp + gates).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def objective_of(name: str, x: Tensor, weight: Tensor, x_teacher: Tensor, weight_teacher: Tensor, *, eager: bool) -> Tensor:
    """[N] the loss of an objective, by the statistics it asks for."""
    import dataclasses

    import torch
    from posttrain_kernels import Head

    from posttrain.registry import find
    from posttrain.stats import Rowwise
    from posttrain.vocabulary import statistics

    objective = find(name)
    want = objective.want(objective.config())
    want = [dataclasses.replace(entry, eager=eager) if isinstance(entry, Rowwise) else entry for entry in want]
    targets = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    found = statistics(Head(x, weight), want, targets=targets, ref=Head(x_teacher, weight_teacher))
    return found["akl"] if name == "akl" else windowed(found["top_logps"], found["top_reference_logps"])


def peer_of_two(name: str, statistic: str) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """(x, weight, x of the teacher, weight of the teacher) -> [N] values of a statistic of two heads."""
    from posttrain.divergences import divergence

    declared = None if statistic in ("akl", "dackl") else divergence({"jsd": "jsd:0.5"}.get(statistic, statistic))

    def naive(x: Tensor, weight: Tensor, x_teacher: Tensor, weight_teacher: Tensor) -> Tensor:
        lp = (x @ weight.T).float().log_softmax(-1)
        lq = (x_teacher @ weight_teacher.T).float().log_softmax(-1)
        if statistic == "dackl":
            likeliest, ids = lq.topk(64)
            return windowed(lp.gather(1, ids), likeliest)
        return adaptive(lp, lq) if declared is None else declared.summand(lp, lq).sum(-1)

    def naive32(*tensors: Tensor) -> Tensor:
        return naive(*(tensor.float() for tensor in tensors))

    def trl(x: Tensor, weight: Tensor, x_teacher: Tensor, weight_teacher: Tensor) -> Tensor:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        beta = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}[statistic]
        return ChunkedDivergenceFunction.apply(x, weight, None, x_teacher, weight_teacher, None, beta)[0]

    def ours(x: Tensor, weight: Tensor, x_teacher: Tensor, weight_teacher: Tensor) -> Tensor:
        from posttrain_kernels import KLS, Head, Separable, head_stats

        if declared is None:
            return objective_of(statistic, x, weight, x_teacher, weight_teacher, eager=name == "eager")
        entry = KLS.get(statistic) or Separable(statistic, declared.summand, declared.slope)
        eager = statistic if name == "eager" else None
        return head_stats(Head(x, weight), [entry], ref=Head(x_teacher, weight_teacher), eager=eager)[statistic]

    return {"naive": naive, "naive32": naive32, "trl": trl, "ours": ours, "eager": ours}[name]


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
    weight = (
        torch.empty(options.vocab, options.hidden, **form)
        .normal_(std=options.spread / options.hidden**0.5)
        .requires_grad_(options.case == "trained")
    )
    if options.statistic == "logp":
        values = peer_of_logp(options.peer)
        rest = [torch.randint(0, options.vocab, (options.tokens,), device=x.device)]
        upstream = torch.randn(options.tokens, device=x.device)
    else:
        values = peer_of_two(options.peer, options.statistic)
        width = options.teacher_hidden or options.hidden
        rest = [
            torch.empty(options.tokens, width, **form).normal_(),
            torch.empty(options.vocab, width, **form).normal_(std=options.spread / width**0.5),
        ]
        upstream = torch.ones(options.tokens, device=x.device)
    leaves = [tensor for tensor in (x, weight) if tensor.requires_grad]

    def call(n: int = options.tokens) -> tuple[Tensor, list[Tensor]]:
        out = values(x[:n], weight, rest[0][:n], *rest[1:])
        gradients = list(torch.autograd.grad(out, leaves, upstream[:n].to(out.dtype))) if leaves else []
        if cuda:
            torch.cuda.synchronize()
        return out.detach(), gradients

    call(8)  # imports, thread pools
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


def measure(options: argparse.Namespace, statistic: str, dtype: str, case: str, name: str) -> dict:
    """One measurement in a fresh process."""
    shape = [f"--{key.replace('_', '-')}={getattr(options, key)}" for key in SHAPE]
    which = [f"--statistic={statistic}", f"--peer={name}", f"--case={case}", f"--dtype={dtype}"]
    command = [sys.executable, "-m", "benchmarks.kernel", *which, *shape]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(options: argparse.Namespace, statistic: str, dtype: str, case: str) -> tuple[list[dict], bool]:
    """Rows of the table for one case, and whether the peers computed the same numbers."""
    names = [name for name in options.peers.split(",") if there_is(name, statistic, dtype, case)]
    rounds = [{name: measure(options, statistic, dtype, case, name) for name in names} for _ in range(options.rounds)]
    rows, baseline = [], None
    for name in names:
        runs = [one[name] for one in rounds]
        row = {key: statistics.median(second for run in runs for second in run[key]) for key in ("wall", "cpu")}
        row |= {"peak": statistics.median(run["peak"] for run in runs), "numbers": runs[0]["numbers"]}
        baseline = baseline or row
        ratios = {f"{key} ratio": row[key] / baseline[key] for key in ("wall", "cpu", "peak")}
        rows.append({"statistic": statistic, "dtype": dtype, "case": case, "peer": name, **row, **ratios})
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
        f"N = {options.tokens}, H = {options.hidden}, H of the teacher = {options.teacher_hidden or options.hidden}, "
        f"V = {options.vocab}; "
        f"{device}; torch {torch.__version__}, trl {version('trl')}; medians of {options.rounds} alternating rounds.\n\n"
        "| statistic | dtype | case | form | seconds | x naive | CPU seconds | x naive | peak MiB | x naive |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )


def line(row: dict) -> str:
    """A line of the table."""
    cells = [row["statistic"], row["dtype"], row["case"], PEERS[row["peer"]]]
    for key, unit, digits in (("wall", 1, 2), ("cpu", 1, 2), ("peak", 2**20, 0)):
        cells += [f"{row[key] / unit:.{digits}f}", f"{row[f'{key} ratio']:.2f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--statistics", default="logp", help=f"of {','.join(STATISTICS)}")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--teacher-hidden", type=int, default=0, help="0: as the student")
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--spread", type=float, default=2.4, help="standard deviation of the logits")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--peers", default=",".join(PEERS), help="the first is what ratios are taken to")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5, help="how long one measurement repeats the call")
    parser.add_argument("--threads", type=int, default=0, help="on a CPU; 0 is what torch chooses")
    parser.add_argument("--json", help="also write the rows, with every number, to this file")
    for name in ("statistic", "peer", "case", "dtype"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        worker(options)
        return
    print(header(options), flush=True)
    rows, differ = [], []
    cases = product(*(given.split(",") for given in (options.statistics, options.dtypes, options.cases)))
    for statistic, dtype, case in cases:
        found, agree = compare(options, statistic, dtype, case)
        print("\n".join(line(row) for row in found), flush=True)
        rows += found
        differ += [] if agree else [f"{statistic} {dtype} {case}"]
    if options.json:
        Path(options.json).write_text(json.dumps({"options": vars(options), "rows": rows}, indent=1))
    if differ:
        sys.exit(f"the forms disagree: {', '.join(differ)}")


if __name__ == "__main__":
    main()
