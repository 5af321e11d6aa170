"""`--launch`: a command in several processes, which accelerate starts and watches; the command ends with the status of theirs.

`accelerate launch` itself, for processes that end with an error, prints the stack of the launcher after what they said
themselves, and ends with 1 whatever their status was.
"""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch
import yaml
from accelerate.commands import launch as accelerate
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from .schema import UserError


def launch(config: Path, words: Sequence[str], processes: int | None) -> NoReturn:
    """Run `posttrain <words>` as a configuration of accelerate says, and end with it.

    Args:
        config: the configuration.
        words: of the command.
        processes: how many; None: one per GPU here.

    Raises:
        UserError: deepspeed is not installed, or there is no GPU to start a process for.
    """
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)  # torch's launcher reports what the processes have said already
    try:
        accelerate.launch_command(accelerate.launch_command_parser().parse_args(arguments(config, words, processes)))
    except ChildFailedError as failed:
        _, first = failed.get_first_failure()
        sys.exit(_status(first.exitcode))
    except subprocess.CalledProcessError as failed:
        sys.exit(_status(failed.returncode))
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
    finally:
        logging.disable(before)
    sys.exit(0)


def arguments(config: Path, words: Sequence[str], processes: int | None) -> list[str]:
    """What `accelerate launch` is told; arguments and errors as in `launch`."""
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    kind = settings.get("distributed_type")
    if kind == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"--launch: {config} needs deepspeed, which is not installed; pip install 'posttrain[deepspeed]'")
    count = processes or (1 if kind == "NO" else torch.cuda.device_count())
    if count < 1:
        raise UserError(
            f"--launch: {config} starts one process per GPU and there is none here; give --processes, or no --launch"
        )
    options = ["--config_file", str(config), "--num_processes", str(count)]
    if count > 1 and settings.get("num_machines", 1) == 1 and "main_process_port" not in settings:
        options += ["--main_process_port", "0"]  # any free one, so that two runs fit on a machine
    return [*options, "-m", "posttrain", *words]


def _status(code: int) -> int:
    """The exit status of a process as a shell tells it: 128 and its number for a signal."""
    return code if code >= 0 else 128 - code
