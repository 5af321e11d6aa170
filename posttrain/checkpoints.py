"""Checkpoints that survive: whole or not there, of one run at a time in a folder, and one more when the run is told to stop.

transformers writes a checkpoint file by file. What makes it complete here is its manifest, written last, beside and renamed:
size and digest of every file. A folder without one, or whose files differ from it, is what a killed run left half-written; no
run continues from it. Older checkpoints go only after the manifest of a newer one is there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import signal
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers import TrainerCallback, TrainingArguments

from .recipe import Run
from .records import difference
from .replacing import replacing
from .schema import UserError

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_LOCK = ".lock"


class Stopped(Exception):
    """The run was told to stop (SIGTERM), and left a checkpoint."""


def checkpoint_to_resume(run: Run) -> str | None:
    """The checkpoint that this run continues, after a look at whose it is; None starts anew.

    The same command continues its run from the newest complete checkpoint in the output folder. If it differs in `train:`,
    `train.resume_from_checkpoint=true` says that this is meant; that setting may also name a checkpoint, or be false.

    Raises:
        UserError: the checkpoint is another run's, damaged, or does not exist; or the output folder holds what this run would
            overwrite.
    """
    output, asked = Path(run.train["output_dir"]), run.train.get("resume_from_checkpoint")
    asked = {"true": True, "false": False}.get(str(asked).lower(), asked)
    if isinstance(asked, str):
        return _continued(run, Path(asked), defect(Path(asked)))
    found = newest(output) if output.is_dir() else None
    if asked:
        return _continued(run, found or output, "" if found else "it holds no complete checkpoint")
    if (found or list(output.glob("*.safetensors"))) and (other := difference(run, output)):
        raise UserError(f"train.output_dir: {output} holds another run's checkpoints or model: {other}; choose another folder")
    if found is None:
        return None
    other = "train.resume_from_checkpoint is false" if asked is False else _differently_trained(run, found)
    if other:
        raise UserError(
            f"train.output_dir: {output} holds checkpoints of this run (the last is {found.name}) and {other}; "
            "train.resume_from_checkpoint=true continues it, another folder starts anew"
        )
    return str(found)


def _continued(run: Run, folder: Path, reason: str) -> str:
    where = "train.resume_from_checkpoint"
    if reason:
        raise UserError(f"{where}: {folder} cannot be continued from: {reason}")
    if other := difference(run, folder):
        raise UserError(f"{where}: {folder} is a checkpoint of another run: {other}")
    return str(folder)


def _differently_trained(run: Run, folder: Path) -> str:
    as_it_was = dataclasses.replace(run, train={**run.train, "resume_from_checkpoint": None})
    return difference(as_it_was, folder, ("train",))


def occupy(output: Path) -> FileLock:
    """Take an output folder for this run until the process ends, however it ends.

    Raises:
        UserError: another run has it, or it cannot be written.
    """
    lock = FileLock(output / _LOCK)
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"train.output_dir: another run is writing into {output}; choose another folder, or wait") from None
    except OSError as error:
        raise UserError(f"train.output_dir: {output} cannot be written: {error.strerror}") from None
    return lock


def step_of(folder: Path) -> int | None:
    """The step of a folder called checkpoint-<step>; None for any other."""
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if folder.name.startswith("checkpoint-") and number.isdigit() and folder.is_dir() else None


def checkpoints(output: Path) -> list[Path]:
    """The checkpoint folders of a run by step, complete or not. Steps order them: clocks may go backwards."""
    found = [folder for folder in output.glob("checkpoint-*") if step_of(folder) is not None]
    return sorted(found, key=lambda folder: step_of(folder) or 0)


def newest(output: Path) -> Path | None:
    """The newest complete checkpoint in an output folder; says which newer ones are not, and why."""
    for folder in reversed(checkpoints(output)):
        reason = defect(folder)
        if not reason:
            return folder
        log.warning("%s is not continued from: %s", folder, reason)
    return None


def defect(folder: Path) -> str:
    """Why a folder is no complete checkpoint; empty if it is one."""
    try:
        listed: Mapping[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return "it has no manifest, so it was not written to its end"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its manifest is damaged ({error})"
    for name, entry in listed.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {entry['bytes']}"
    digests = _digests([folder / name for name in listed])
    wrong = [name for (name, entry), digest in zip(listed.items(), digests, strict=True) if digest != entry["blake2b"]]
    return f"{wrong[0]} is damaged (checksum)" if wrong else ""


def write_manifest(folder: Path, **facts: Any) -> None:
    """Declare a checkpoint complete: size and digest of every file, beside what is known of the run (`facts`)."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    entries = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "blake2b": digest}
        for path, digest in zip(files, _digests(files), strict=True)
    }
    with replacing(folder / MANIFEST) as partial:
        partial.write_text(json.dumps({**facts, "files": entries}, indent=1), encoding="utf-8")


def refuse_other_processes(folder: Path, args: TrainingArguments) -> None:
    """A sharded optimizer fits only as many processes as wrote it; others continue with other random numbers per process.

    Raises:
        UserError: DeepSpeed's shards are of another number of processes.
    """
    wrote = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["processes"]
    if wrote == args.world_size:
        return
    if args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise UserError(
            f"{folder} holds the shards of {wrote} processes, this run has {args.world_size}: DeepSpeed cuts the optimizer by "
            f"their number; use {wrote} again, or train anew from the weights (--model {folder})"
        )
    log.warning(
        "%s was written by %d processes and is continued by %d: the batches to come differ", folder, wrote, args.world_size
    )


def _digests(paths: list[Path]) -> list[str]:
    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()

    with ThreadPoolExecutor(max_workers=4) as pool:
        return list(pool.map(digest, paths))


class Checkpoints(TrainerCallback):
    """Completes each checkpoint with its manifest, removes old ones, and saves one more on SIGTERM.

    Args:
        keep: complete checkpoints to keep, the best one beside them (train.save_total_limit); None keeps all.
        accelerator: of the trainer.
    """

    def __init__(self, keep: int | None, accelerator: Any) -> None:
        self.keep, self.accelerator = keep, accelerator
        self.stopped = False
        self._before: Any = None

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove what a killed run left half-written, and listen."""
        if state.is_world_process_zero:
            for folder in checkpoints(Path(args.output_dir)):
                if not (folder / MANIFEST).is_file():
                    shutil.rmtree(folder)
        self._before = signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, number: int, frame: Any) -> None:
        self.stopped = True
        signal.signal(signal.SIGTERM, self._before)  # a second one ends the process at once

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop together; and log at each checkpoint, so that no log averages steps on both sides of one."""
        if self.accelerator.num_processes > 1:
            import torch

            told = torch.tensor([float(self.stopped)], device=self.accelerator.device)
            self.stopped = bool(self.accelerator.reduce(told, "sum") > 0)
        if self.stopped:
            control.should_save = control.should_training_stop = True
        if control.should_save:
            control.should_log = True

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """The files of all processes are there: declare the checkpoint complete, then remove old ones."""
        self.accelerator.wait_for_everyone()
        if not state.is_world_process_zero:
            return
        output = Path(args.output_dir)
        write_manifest(output / f"checkpoint-{state.global_step}", processes=args.world_size)
        if not self.keep:
            return
        folders = [folder for folder in checkpoints(output) if (folder / MANIFEST).is_file()]
        best = Path(state.best_model_checkpoint).name if state.best_model_checkpoint else ""
        for folder in folders[: -self.keep]:
            if folder.name != best:
                (folder / MANIFEST).unlink()  # first: what is half removed is not complete
                shutil.rmtree(folder)

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen no more."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
