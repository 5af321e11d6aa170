"""What a trainer started ends with it, even when it is killed."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from posttrain.engines.guard import Guard

PARENT = """
import os, subprocess, sys, time
from posttrain.engines.guard import Guard

def sleeper():
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"], start_new_session=True).pid

other = sleeper()
guard = Guard()
forked = os.fork()  # holds the guard's pipe
if not forked:
    os.setsid()
    print(sleeper(), flush=True)
    time.sleep(120)
time.sleep(1)
if "settle" in sys.argv:
    guard.settle()
    time.sleep(0.5)
    print(forked, sleeper(), other, guard.pid, flush=True)
else:
    print(forked, other, guard.pid, flush=True)
time.sleep(120)
"""


def gone(processes: list[psutil.Process]) -> bool:
    """Whether all end within a minute."""
    _, alive = psutil.wait_procs(processes, timeout=60)
    return not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("words", [[], ["settle"]])
def test_a_killed_trainer_leaves_nothing_behind(words: list[str]) -> None:
    """A child and its child end with it, whether all had been started by then or not; those that it had before, or got later,
    live."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT, *words], stdout=subprocess.PIPE, text=True)
    told = [int(pid) for line in (parent.stdout.readline(), parent.stdout.readline()) for pid in line.split()]
    inner, forked, *others, watching = map(psutil.Process, told)
    try:
        assert len(others) == 1 + len(words) and all(one.is_running() for one in (inner, forked, watching))
        parent.kill()
        parent.wait()
        assert gone([inner, forked, watching])
        assert all(one.is_running() for one in others)
    finally:
        for one in others:
            one.kill()


def test_a_guard_that_is_not_needed_ends() -> None:
    """And ends nothing."""
    guard = Guard()
    watching = psutil.Process(guard.pid)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    guard.settle()
    guard.close()
    assert gone([watching]) and child.poll() is None
    child.communicate(b"\n")
    assert child.returncode == 0
