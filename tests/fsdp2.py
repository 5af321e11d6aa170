"""FSDP2 on CPU processes, as accelerate shards a model: `torchrun --nproc-per-node 2 fsdp2.py`.

Accelerate trains under FSDP2 on GPUs only, so its own sharding is applied here to models outside of a training: statistics,
gradients and a sharded reference have to be those of the whole models.
"""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from tiny_models import VOCABULARY, tiny
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from posttrain.leave import leave
from posttrain.models import Request, attach, model_inputs
from posttrain.reference import FrozenModel
from posttrain.trees import TreeCollator

WANT = ("logp", "entropy", "forward_kl", "reverse_kl")


def accelerator() -> Any:
    """What accelerate's sharding reads of an accelerator."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True, cpu_ram_efficient_loading=False
    )
    return SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin, deepspeed_plugin=None),
        torch_device_mesh=None,
        parallelism_config=None,
        mixed_precision="no",
        is_main_process=torch.distributed.get_rank() == 0,
        device=torch.device("cpu"),
        distributed_type="FSDP",
        is_fsdp2=True,
    )


def batch(rank: int) -> dict[str, Tensor]:
    """Rows of a process; the last one has none."""
    draw = torch.Generator().manual_seed(rank)
    ids = lambda n: torch.randint(3, VOCABULARY, (n,), generator=draw).tolist()  # noqa: E731
    rows = [{"prompt": ids(4), "chosen": [ids(3)], "rejected": [ids(5)]} for _ in range(2)]
    return TreeCollator(("chosen", "rejected"))(rows if rank == 0 else [])


def loss(model: nn.Module, reference: FrozenModel, rows: dict[str, Tensor]) -> Tensor:
    """A sum over all statistics; 0 with gradients of 0 for a batch without rows."""
    request = Request(gather=rows["gather"], targets=rows["targets"], want=WANT)
    heads, _ = reference.heads(model, rows, "tree", dataclasses.replace(request, want=()))
    said = model(**model_inputs(model, rows, "tree"), statistics=dataclasses.replace(request, refs=heads))
    return sum((i * said[name]).sum() for i, name in enumerate(WANT, start=1))


def main() -> None:
    """Compare; the processes end with an error where anything differs."""
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for tied in (False, True):
        models = [tiny("llama", dtype=torch.float64, seed=seed, tie_word_embeddings=tied) for seed in (0, 1)]
        whole, reference = copy.deepcopy(models)
        for one in (whole, reference, *models):
            attach(one)  # after the copy, which would answer with the weights of its original
        expected = [loss(whole, FrozenModel(reference, "whole"), batch(other)) for other in range(world)]
        (sum(expected) / world).backward()  # gradients are averaged over processes
        sharded = fsdp2_prepare_model(accelerator(), models[0])
        frozen = FrozenModel(models[1], "sharded")
        frozen.prepare(accelerator())
        for model in (sharded, frozen.lm):
            assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        for _ in range(2):  # the second time everything has been gathered and given back before
            sharded.zero_grad()
            found = loss(sharded, frozen, batch(rank))
            found.backward()
            torch.testing.assert_close(found, expected[rank], rtol=1e-9, atol=1e-9)
        for (name, parameter), other in zip(sharded.named_parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad.full_tensor(), other.grad, rtol=1e-8, atol=1e-10, msg=name)
    leave()


if __name__ == "__main__":
    main()
