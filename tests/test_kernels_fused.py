"""Where the fused kernel runs, and that it equals the dense definition in Triton's interpreter, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from heads import cast, ids, policy
from posttrain_kernels import choose, head_stats, why_not_fused

HERE = Path(__file__).parent


def test_equals_the_definition_in_the_interpreter() -> None:
    """TRITON_INTERPRET has to be set before anything imports triton, hence the process."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / "fused_cases.py")]
    done = subprocess.run(
        command, cwd=HERE.parent, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_compiles_for_a_gpu_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For compute capability 9.0, with the options that take most code and with those of log-probs alone."""
    triton = pytest.importorskip("triton")
    from posttrain_kernels import fused
    from posttrain_kernels.formulas import FORMULAS
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sizes = {"z_stride", "zq_stride", "out_stride", "width", "start", "count", "n", "stride"}
    integers = {"ids": "*i64", "argmax": "*i64", "out": "*bf16", "bias": "*bf16", "constant": "fp32"} | dict.fromkeys(
        sizes, "i32"
    )
    absent = dict.fromkeys(("bias", "temperature", "e1", "e2", "c0", "c1", "c2", "zq", "common", "reference", "pairs"))
    alone = {"SCALE": 1.0, "CAP": None, "NAMES": (), "PARAMETERS": (), "K": 1, "BLOCK": 8192, "count": 1, **absent}
    every = {"SCALE": 0.5, "CAP": 30.0, "NAMES": FORMULAS, "PARAMETERS": (0.3,) * len(FORMULAS), "K": 64, "BLOCK": 2048}
    for kernel, options in ((fused._fold, alone), (fused._fold, every), (fused._gradient, alone), (fused._gradient, every)):
        names = kernel.arg_names
        constants = {name: value for name, value in options.items() if name in names}
        signature = {name: "constexpr" if name in constants else integers.get(name, "*fp32") for name in names}
        source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 16, "enable_fp_fusion": True})
        assert len(compiled.asm["cubin"]) > 1000


def test_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    head = cast(policy(), torch.float32)[0]
    with pytest.raises(
        ValueError, match="impl: fused: the hidden states are on cpu; an NVIDIA GPU is needed, or TRITON_INTERPRET=1"
    ):
        head_stats(head, ["logp"], target=ids(), impl="fused")
    assert torch.equal(*(head_stats(head, ["logp"], target=ids(), impl=impl)["logp"] for impl in ("auto", "chunked")))
    with pytest.raises(ValueError, match="impl: no implementation 'trition'; possible: auto, dense, chunked, fused"):
        head_stats(head, ["logp"], target=ids(), impl="trition")
    monkeypatch.setenv("POSTTRAIN_KERNEL", "fused")
    with pytest.raises(ValueError, match="POSTTRAIN_KERNEL: fused: the hidden"):
        head_stats(head, ["logp"], target=ids())
    monkeypatch.delenv("POSTTRAIN_KERNEL")
    on_gpu = SimpleNamespace(
        x=SimpleNamespace(is_cuda=True, dtype=torch.float64, device=torch.device("cuda")), dtype=torch.float64
    )
    assert [choose.implementation("auto", on_gpu, None) for _ in range(2)] == ["chunked"] * 2
    assert [record.getMessage() for record in caplog.records] == [
        "the kernel does without Triton here: the head is torch.float64; hidden states of 32 bits or less are needed"
    ]
    assert [choose.implementation(impl, head, None) for impl in ("dense", "chunked")] == ["dense", "chunked"]
    monkeypatch.setenv("POSTTRAIN_KERNEL", "dense")
    assert choose.implementation("auto", head, None) == "dense"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert why_not_fused(head) is None
    assert why_not_fused(policy()) == "the head is torch.float64; hidden states of 32 bits or less are needed"
    assert why_not_fused(head, policy()) == "the ref is torch.float64; hidden states of 32 bits or less are needed"
    choose._triton.cache_clear()
    monkeypatch.setattr(choose, "version", lambda name: "3.5.1")
    assert why_not_fused(head) == "triton 3.5.1 is too old; 3.6 or later is needed"

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    choose._triton.cache_clear()
    monkeypatch.setattr(choose, "version", missing)
    assert why_not_fused(head) == "triton is not installed"
    choose._triton.cache_clear()
