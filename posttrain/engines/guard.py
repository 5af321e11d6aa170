"""Ends what a process started once that process has ended, however it did: vLLM outlives a parent that is killed.

`Guard` starts this file as a program. It notes which children its parent gets until it is told that all are there, and kills
them, with theirs, when it has another parent. It reads no pipe to its end for that: children that were forked hold its other
end open.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys

_PAUSE = 0.2
"""Seconds between two looks: a child that is younger when its parent dies may be missed."""


class Guard:
    """Kills the children that this process starts from now until `settle` as soon as this process has ended."""

    def __init__(self) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen([sys.executable, "-P", __file__], start_new_session=True, **pipes)
        self._process.stdout.readline()  # it has seen which children are there already

    @property
    def pid(self) -> int:
        """Number of the process that watches."""
        return self._process.pid

    def settle(self) -> None:
        """All are there: later children are left alone, and nobody has to look for them."""
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()

    def close(self) -> None:
        """Watch no longer."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            pipe.close()


def main() -> None:
    """Watch the parent."""
    import psutil  # comes with accelerate

    parent = psutil.Process(os.getppid())
    before, found, looking = {*parent.children(recursive=True), psutil.Process()}, set(), True
    print(flush=True)
    while os.getppid() == parent.pid:
        told = select.select([sys.stdin], [], [], _PAUSE)[0]
        if looking:
            with contextlib.suppress(psutil.NoSuchProcess):
                found |= {*parent.children(recursive=True)} - before
        if told and not os.read(sys.stdin.fileno(), 1):
            break
        looking = looking and not told
    for one in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in (*one.children(recursive=True), one):
                process.kill()


if __name__ == "__main__":
    main()
