"""Two processes get the rows of one, step by step, and about as many tokens each; tests/dealt.py deals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from dealt import DONE, LENGTHS, Batches, dealt

BATCH, ACCUMULATION, PROCESSES = 2, 2, 2


def steps(batches: Batches, accumulation: int) -> list[list[int]]:
    """The rows of each step."""
    whole = range(0, len(batches), accumulation)
    return [[row for batch in batches[at : at + accumulation] for row in batch if row is not None] for at in whole]


def tokens(rows: list[int]) -> int:
    """All of theirs."""
    return int(sum(LENGTHS[row] for row in rows))


@pytest.mark.multi
def test_two_processes_get_the_steps_of_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    program = [str(Path(__file__).parents[1] / "dealt.py"), str(tmp_path)]
    done = subprocess.run([*command, *program], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    alone = dealt(tmp_path, BATCH, ACCUMULATION * PROCESSES)
    sides = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(PROCESSES)]
    for name in ("first", "second"):
        theirs = list(zip(*(steps(side[name], ACCUMULATION) for side in sides), strict=True))
        whole = [[*one, *other] for one, other in theirs]
        assert list(map(sorted, whole)) == list(map(sorted, steps(alone[name], ACCUMULATION * PROCESSES)))
        assert sorted(row for rows in whole for row in rows) == list(range(len(LENGTHS)))
        longest = [max(LENGTHS[row] for row in rows) for rows in whole]
        apart = [abs(tokens(one) - tokens(other)) for one, other in theirs]
        assert all(gap <= most for gap, most in zip(apart[:-1], longest, strict=False)), (apart, longest)
    assert sides[0]["first"] != sides[0]["second"]
    assert all(side["rest"] == side["first"][DONE * ACCUMULATION :] for side in sides)
