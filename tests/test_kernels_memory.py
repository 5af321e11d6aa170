"""Memory that runs out in the kernel, for real: a process that may have no more than so much."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from heads import cast, policy, reference
from posttrain_kernels import costs, l1_cost, memory, span_cost, top, top_k
from torch import Tensor

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
    allow(20 << 20)
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


SINGLE, LAST = torch.arange(8), torch.arange(1, 9)

OTHERS = {
    "top_k": (top, lambda head, ref: top_k(head, 5, workspace=8 << 20)[1]),
    "l1_cost": (costs, lambda head, ref: l1_cost(head, ref, workspace=8 << 20)),
    "span_cost": (costs, lambda head, ref: span_cost(head, ref, SINGLE, LAST, workspace=8 << 20)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_calls_try_less_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, each on its own; what comes out is what enough memory gives."""
    module, call = OTHERS[name]
    plain = module.sizes_of
    most = 8 << 20
    tried: list[int] = []

    def scarce(head: object, workspace: int, **kwargs: int) -> object:
        tried.append(workspace)
        if workspace > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(head, workspace, **kwargs)

    def results(forward: int, backward: int) -> list[Tensor]:
        nonlocal most
        monkeypatch.setattr(memory, "_limits", {})
        most = forward
        head, leaves = cast(policy(n=9, v=500), torch.float32)
        out = call(head, cast(reference(9, 500), torch.float32)[0])
        monkeypatch.setattr(memory, "_limits", {})
        most = backward
        return [out, *(torch.autograd.grad(out.sum(), leaves) if out.requires_grad else ())]

    monkeypatch.setattr(module, "sizes_of", scarce)
    expected = results(8 << 20, 8 << 20)
    assert set(tried) == {8 << 20}
    tried.clear()
    found = results(4 << 20, 2 << 20)
    assert set(tried) == ({8 << 20, 4 << 20, 2 << 20} if name != "top_k" else {8 << 20, 4 << 20})
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
