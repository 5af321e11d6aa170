"""Jobs of a benchmark, each in a process of its own, so that its peak of memory is its own and nothing is warm from another.

A job is JSON; the module that it belongs to has a function `one(job) -> result`, JSON too.

    python -m benchmarks.isolated <module> <job> <file for the result>
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Results = dict[str, list[dict[str, Any]]]
"""Row of the table -> results of its jobs."""


def isolated(module: str, job: Any) -> dict[str, Any]:
    """What `module.one(job)` returns, computed in a fresh process, of the interpreter in the job's `python` if it has one.

    Raises:
        SystemExit: the process failed; its last words.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "result.json")
        command = [job.get("python", sys.executable), "-m", "benchmarks.isolated", module, json.dumps(job), str(answer)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{module} {json.dumps(job)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        return json.loads(answer.read_text())


def sweep(
    module: str, jobs: Iterable[tuple[str, Any]], table: Callable[[Results], str], output: str, *, add: bool = False
) -> Results:
    """Run jobs one after the other; after each, write all results to `output` and print the table of them.

    Args:
        module: whose jobs they are.
        jobs: row of the table and job; several jobs of one row are its repetitions.
        table: results -> Markdown.
        output: a JSON file.
        add: to the results that the file holds already, so that a long sweep can be split over several commands.
    """
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    results: Results = json.loads(path.read_text()) if add and path.exists() else {}
    for row, job in jobs:
        results.setdefault(row, []).append(isolated(module, job))
        path.write_text(json.dumps(results, indent=1))
        print(table(results), flush=True)
    return results


if __name__ == "__main__":
    name, told, answer = sys.argv[1:]
    Path(answer).write_text(json.dumps(importlib.import_module(name).one(json.loads(told))))
