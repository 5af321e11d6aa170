"""How a program of several processes ends."""

from __future__ import annotations

import atexit
import os
import sys

from accelerate import PartialState


def leave(status: int = 0) -> None:
    """End a program of several processes together: one that goes early closes its connections under those still at work.

    Of several processes this one ends here, after its exit handlers and without taking the interpreter apart: threads of gloo
    that still hold a tensor then would end it by SIGABRT. Alone it goes on.

    Args:
        status: what the process ends with.
    """
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()
    if state.num_processes > 1:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
