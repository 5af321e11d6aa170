"""Memory that runs out in the kernel, for real: a process that may have no more than so much."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from posttrain_kernels import memory

PROGRAM = """
import logging, resource, sys
import torch
from posttrain_kernels import Head, head_stats, memory

logging.basicConfig(stream=sys.stdout, format="%(message)s")
torch.set_num_threads(1)
torch.manual_seed(0)
x, weight, other = torch.randn(3000, 16), torch.randn(20_000, 16), torch.randn(20_000, 16)
target = torch.randint(20_000, (3000,))
SPACE = 1 << 29


def statistics(workspace):
    head = Head(x.clone().requires_grad_(), weight.clone().requires_grad_())
    out = head_stats(head, ["logp", "forward_kl"], target=target, ref=Head(x, other), workspace=workspace)
    return head, out["logp"] + out["forward_kl"]


def gradients(head, values):
    values.sum().backward()
    return [values.detach(), head.x.grad, head.weight.grad]


def allow(more):
    held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + more, resource.RLIM_INFINITY))


expected = gradients(*statistics(1 << 22))
if sys.argv[1] == "forward":
    allow(60 << 20)
    held = statistics(SPACE)
else:
    held = statistics(SPACE)
    allow(40 << 20)
found = gradients(*held)
allow(1 << 40)
print("halved" if memory._limits else "whole", all(torch.allclose(a, b, atol=1e-4) for a, b in zip(expected, found)))
"""


@pytest.mark.multi
@pytest.mark.parametrize("part", ["forward", "backward"])
def test_less_is_tried_and_gives_the_same(part: str) -> None:
    got = subprocess.run([sys.executable, "-c", PROGRAM, part], capture_output=True, text=True)
    assert got.returncode == 0, got.stderr[-3000:]
    said, result = got.stdout.splitlines()
    assert said.startswith("memory ran out in the kernel: its workspace is now ") and result == "halved True"


def test_it_gives_up_in_the_end(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(memory, "_limits", {})
    tried: list[int] = []

    def attempt(workspace: int) -> int:
        tried.append(workspace)
        if workspace > enough:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return workspace

    cpu = torch.device("cpu")
    enough = 3 << 20
    assert memory.with_less(attempt, 8 << 20, cpu) == 2 << 20 and tried == [8 << 20, 4 << 20, 2 << 20]
    assert memory.with_less(attempt, 8 << 20, cpu) == 2 << 20 and len(tried) == 4  # remembered
    assert len(caplog.records) == 1
    enough = 0
    with pytest.raises(torch.OutOfMemoryError):
        memory.with_less(attempt, 8 << 20, cpu)
    assert min(tried) == memory.LEAST


def test_other_errors_are_not_swallowed() -> None:
    def attempt(workspace: int) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        memory.with_less(attempt, 8 << 20, torch.device("cpu"))
