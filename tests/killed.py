"""A command, killed by SIGKILL again and again at chosen places, and started anew: `python killed.py SPECIFICATION`.

The specification is JSON: `words` of the command, and `places`: [module, function or Class.method, n, before or after]. Each
place is a start of the command that ends when that function is called for the n-th time; the last start has none and ends by
itself. Every start is a process of its own, forked before anything has run: nothing but files is left of the one before.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import sys
from typing import Any


def arm(module: str, name: str, n: int, when: str) -> None:
    """Have this process killed at the n-th call of a function."""
    *inside, name = name.split(".")
    owner: Any = functools.reduce(lambda of, part: vars(of)[part], inside, importlib.import_module(module))
    function, calls = vars(owner)[name], 0

    def armed(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == n and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if calls == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, armed)


def start(words: list[str], place: list[Any] | None) -> int:
    """The status of the command: minus the number of the signal that ended it."""
    child = os.fork()
    if child == 0:
        if place is not None:
            arm(*place)
        from posttrain.cli import main

        try:
            main(words)
        except SystemExit as end:
            os._exit(end.code if isinstance(end.code, int) else 1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    importlib.import_module("posttrain.iterate")  # once, and not in every child
    vars(importlib.import_module("posttrain.verdicts"))["TOGETHER"] = 3  # so that a file of verdicts is made in parts

    asked = json.loads(sys.argv[1])
    for place in asked["places"]:
        status = start(asked["words"], place)
        assert status == -signal.SIGKILL, f"ended with {status} before {place}"
    assert start(asked["words"], None) == 0
