"""FSDP2's sharded heads on two processes; tests/fsdp2.py says what is compared."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.multi
def test_statistics_and_gradients_are_those_of_the_whole_model() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = str(Path(__file__).parents[1] / "fsdp2.py")
    done = subprocess.run([*command, program], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
