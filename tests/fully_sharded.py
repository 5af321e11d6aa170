"""Parameters of an objective's own under FSDP2, in the processes that torchrun started: run by test_learned.py.

`torchrun --nproc-per-node 2 fully_sharded.py FOLDER` computes, writes, forgets and reads masks; it ends with status 0 if they
are those of the whole parameters.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from random_statistics import own_of, random_statistics
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from posttrain import learned
from posttrain.leave import leave
from posttrain.registry import find
from posttrain.stats import Pairs


def main(folder: Path) -> None:
    """Two layers of width 7 over two processes: the pieces are uneven."""
    distributed.init_process_group("gloo")
    objective = find("sparsepo")
    whole = own_of(objective, objective.config())
    drawn = random_statistics(Pairs, want=objective.want(objective.config())).chosen
    given = {"logp": drawn.logps.detach(), **drawn.more}
    sharded = copy.deepcopy(whole)
    fully_shard(sharded)
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    mask, expected = (one(given, drawn.lengths)["mask"] for one in (sharded, whole))
    torch.testing.assert_close(mask, expected, rtol=0, atol=0)
    mask.sum().backward()
    expected.sum().backward()
    sharded.reshard()
    for one, other in zip(sharded.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one.grad.full_tensor(), other.grad, rtol=0, atol=1e-12)
    learned.save(sharded, folder, write=distributed.get_rank() == 0)
    distributed.barrier()
    with torch.no_grad():
        for parameter in sharded.parameters():
            parameter.zero_()
    learned.load(sharded, folder)
    for one, other in zip(sharded.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one.full_tensor(), other)
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
