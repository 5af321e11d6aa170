"""What a trainer started ends with it, even when it is killed."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil

PARENT = """
import subprocess, sys, time, psutil
from posttrain.engines.vllm import guard
sleep = [sys.executable, "-c", "import time; time.sleep(120)"]
child, other = (subprocess.Popen(sleep, start_new_session=True) for _ in range(2))
watching = guard([f"{child.pid}@{psutil.Process(child.pid).create_time()!r}", f"{other.pid}@1.0"])
print(child.pid, other.pid, watching.pid, flush=True)
time.sleep(120)
"""


def test_a_killed_trainer_leaves_nothing_behind() -> None:
    """What it guards is gone; a process that only has the number of one that it guards lives."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    child, other, watching = (psutil.Process(int(pid)) for pid in parent.stdout.readline().split())
    time.sleep(0.5)
    assert child.is_running() and watching.is_running()
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs([child, watching], timeout=60)
    try:
        assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]
        assert other.is_running()
    finally:
        other.kill()
