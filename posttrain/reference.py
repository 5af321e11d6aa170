"""The reference, three ways behind one interface: a frozen model, the policy with its adapter off, cached log-probs.

The cache is addressed by content: a folder per model (weights, dtype), and in it one entry per (prompt, completion) token
sequence. Whatever does not change a log-prob (beta, learning rate, seed, output folder, order, other rows) does not change
a key, so a sweep computes each reference log-prob once.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from posttrain_kernels import ONE_HEAD, Head
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .inside import name
from .models import Request, causal_lm, evaluating, head_of, model_inputs
from .registry import Objective
from .replacing import replacing
from .schema import UserError
from .stats import Activations
from .trees import Batch, Layout, TreeCollator
from .vocabulary import mean_logits

_VERSION = "1"
_SHARD_TOKENS = 2_000_000
"""Log-probs a shard holds: 8 MB, a few minutes of work on a GPU; a crash loses at most the unfinished shard."""


class FrozenModel:
    """A second model, never trained; it reads the rows as its own architecture has to."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model = model.eval().requires_grad_(False)
        self.lm = causal_lm(model)
        self._whole: dict[str, Tensor] = {}
        self.description = f"frozen model {name}"

    def body(self, model: nn.Module) -> PreTrainedModel:
        """The transformers model that answers; `model` is the policy."""
        del model
        return self.lm

    def prepare(self, accelerator: Any) -> None:
        """Move it to the device; under ZeRO-3 and FSDP2 shard it, layer by layer, as the policy is."""
        if accelerator.is_fsdp2:
            self.model = fsdp2_prepare_model(accelerator, self.model)  # also brings the weights that one process has read
            self._whole = {name: _full(p) for name, p in self.lm.get_output_embeddings().named_parameters()}
            return
        plugin = accelerator.state.deepspeed_plugin if accelerator.distributed_type == "DEEPSPEED" else None
        if plugin is None or plugin.zero_stage != 3:
            self.model.to(accelerator.device)
            return
        import deepspeed

        config = copy.deepcopy(plugin.deepspeed_config)
        for key in ("optimizer", "scheduler"):
            config.pop(key, None)
        self.model, *_ = deepspeed.initialize(model=self.model, config=config)
        self.model.eval()
        # Divergences read its head in the policy's forward and backward, where ZeRO-3 does not gather it: it stays whole.
        parameters = dict(self.lm.get_output_embeddings().named_parameters())
        with deepspeed.zero.GatheredParameters(list(parameters.values())):
            self._whole = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def answer(self, model: nn.Module, batch: Batch, layout: Layout, request: Request) -> dict[str, Tensor]:
        """What the reference says of the tokens in `request` of a batch; `model` is the policy."""
        del model
        with torch.no_grad():
            return self.model(**model_inputs(self.lm, batch, layout), statistics=request)

    def heads(
        self, model: nn.Module, batch: Batch, layout: Layout, request: Request
    ) -> tuple[tuple[Head, ...], dict[str, Tensor]]:
        """Its output head on those tokens, for divergences, and what it says of its inside."""
        told = self.answer(model, batch, layout, request)
        head = dataclasses.replace(head_of(self.lm, told.pop("hidden")), **self._whole)
        return _with_logits(head, told, request)


class AdapterOff:
    """The policy with its adapter switched off."""

    description = "the policy with its adapter off"

    def body(self, model: nn.Module) -> PreTrainedModel:
        """The transformers model that answers; `model` is the policy."""
        return causal_lm(model)

    def prepare(self, accelerator: Any) -> None:
        """Nothing: it is the policy."""

    def answer(self, model: nn.Module, batch: Batch, layout: Layout, request: Request) -> dict[str, Tensor]:
        """What the reference says of the tokens in `request` of a batch; `model` is the policy."""
        with torch.no_grad(), evaluating(model), model.disable_adapter():
            return model(**model_inputs(model, batch, layout), statistics=request)

    def heads(
        self, model: nn.Module, batch: Batch, layout: Layout, request: Request
    ) -> tuple[tuple[Head, ...], dict[str, Tensor]]:
        """Its output head on those tokens, for divergences, and what it says of its inside."""
        told = self.answer(model, batch, layout, request)
        with model.disable_adapter(), _gathered(causal_lm(model).get_output_embeddings()):
            head = head_of(model, told.pop("hidden"))
            # A tensor of its own still holds the weight when ZeRO-3 has partitioned the parameter again.
            bias = None if head.bias is None else _full(head.bias)
            return _with_logits(dataclasses.replace(head, weight=_full(head.weight), bias=bias), told, request)


class Teachers:
    """One or several teachers of a distillation, each a model of its own or the student with its adapter off.

    Args:
        members: the teachers.
        weights: of each in the loss; they sum to 1.
        size: number of tokens that student and teachers have in common; the teachers' distributions end there.
    """

    def __init__(self, members: Sequence[FrozenModel | AdapterOff], weights: Sequence[float], size: int) -> None:
        self.members, self.weights, self.size = members, weights, size
        shares = [f"{one.description} ({weight:.0%})" for one, weight in zip(members, weights, strict=True)]
        self.description = ", ".join(shares) if len(members) > 1 else members[0].description

    @property
    def models(self) -> list[nn.Module]:
        """Those that are models of their own."""
        return [one.lm for one in self.members if isinstance(one, FrozenModel)]

    def body(self, model: nn.Module) -> PreTrainedModel:
        """The transformers model of the first; `model` is the student."""
        return self.members[0].body(model)

    def prepare(self, accelerator: Any) -> None:
        """Move or partition them."""
        for one in self.members:
            one.prepare(accelerator)

    def heads(
        self, model: nn.Module, batch: Batch, layout: Layout, request: Request
    ) -> tuple[tuple[Head, ...], dict[str, Tensor]]:
        """The output head of each on the tokens in `request` of a batch, and what each says of its inside, of all but the
        first with their number before it; `model` is the student."""
        heads, told = [], {}
        for number, one in enumerate(self.members):
            (head,), inside = one.heads(model, batch, layout, request)
            heads.append(dataclasses.replace(head, vocab=min(self.size, head.size)))
            told |= {f"{number}/{name}" if number else name: values for name, values in inside.items()}
        return tuple(heads), told


class CachedLogps:
    """Per-token log-probs on disk. The collator looks them up (`lookup`), so no reference model is held while training."""

    def __init__(self, folder: Path, fingerprint: str, name: str) -> None:
        self.folder = folder / "reference" / fingerprint
        self.description = f"cached log-probs of {name} ({self.folder})"
        self._entries: dict[bytes, np.ndarray] = {}
        self._seen: set[Path] = set()
        self.reload()

    def __len__(self) -> int:
        return len(self._entries)

    def body(self, model: nn.Module) -> PreTrainedModel:
        """The policy, for want of another model."""
        return causal_lm(model)

    def prepare(self, accelerator: Any) -> None:
        """Nothing: the log-probs come with the batch."""

    def reload(self) -> None:
        """Read the shards that are not in memory yet.

        Raises:
            UserError: a shard is damaged, or was written by another version.
        """
        for path in sorted(set(self.folder.glob("*.safetensors")) - self._seen):
            for key, logps in _read_shard(path):
                self._entries[key] = logps
            self._seen.add(path)

    def lookup(self, prompt: Sequence[int], completion: Sequence[int]) -> dict[str, np.ndarray]:
        """`reference_logps`, [T] float32, of a completion given its prompt; of one without tokens none.

        Raises:
            UserError: it was never computed (the data changed since).
        """
        if not completion:
            return {"reference_logps": np.empty(0, dtype=np.float32)}
        key = sequence_key(prompt, completion)
        if key not in self._entries:
            raise UserError(f"reference: {self.folder} lacks a completion of {len(completion)} tokens; run `posttrain logps`")
        return {"reference_logps": self._entries[key]}

    def missing(self, rows: Iterable[dict[str, Any]], roles: Sequence[str]) -> list[dict[str, Any]]:
        """The rows with at least one completion that is not in the cache."""

        def absent(row: dict[str, Any]) -> bool:
            return any(sequence_key(row["prompt"], c) not in self._entries for role in roles for c in row[role])

        return [row for row in rows if absent(row)]

    def fill(
        self, model: nn.Module, rows: Sequence[dict[str, Any]], roles: Sequence[str], layout: str, batch_size: int
    ) -> Iterator[int]:
        """Compute the log-probs of `rows` with `model` and write them, shard by shard; yields the rows done so far.

        Every shard is written beside and renamed, so an interrupted run keeps what it had finished.
        """
        device = next(model.parameters()).device
        collate = TreeCollator(roles=roles, layout=layout)
        order = sorted(range(len(rows)), key=lambda i: _row_tokens(rows[i], roles))
        shard: list[tuple[bytes, np.ndarray]] = []
        with torch.no_grad(), evaluating(model):
            for start in range(0, len(order), batch_size):
                chosen = [rows[i] for i in order[start : start + batch_size]]
                batch = {name: tensor.to(device) for name, tensor in collate(chosen).items()}
                request = Request(gather=batch["gather"], targets=batch["targets"], want=("logp",))
                logps = model(**model_inputs(model, batch, layout), statistics=request)["logp"].float().cpu().numpy()
                shard += _cut(logps, chosen, roles)
                if sum(len(values) for _, values in shard) >= _SHARD_TOKENS:
                    _write_shard(self.folder, shard)
                    shard = []
                yield start + len(chosen)
        if shard:
            _write_shard(self.folder, shard)


def _with_logits(head: Head, told: dict[str, Tensor], request: Request) -> tuple[tuple[Head, ...], dict[str, Tensor]]:
    """What a model says of its inside, completed by what only its output head can say."""
    if Activations(of="logits") in request.inside:
        with torch.no_grad():
            told |= {name("logits"): mean_logits(head)[:, None]}
    return (head,), told


@contextlib.contextmanager
def _gathered(module: nn.Module) -> Iterator[None]:
    """While this is open, parameters that ZeRO-3 partitions are whole."""
    partitioned = [parameter for parameter in module.parameters() if "ds_id" in vars(parameter)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def _full(parameter: Tensor) -> Tensor:
    """Its values, whole where FSDP2 shards it."""
    values = parameter.detach()
    return values.full_tensor() if isinstance(values, DTensor) else values


def reads_vocabulary(objective: Objective, config: Any) -> bool:
    """Whether an objective reads the reference over the whole vocabulary, or inside, for which cached log-probs do not do."""
    return objective.reads_reference(config) and any(entry not in ONE_HEAD for entry in objective.want(config))


def fingerprint(name: str, model: nn.Module, dtype: str) -> str:
    """What identifies the numbers of a model: its weights (files of a folder, commit of a hub id) and the dtype computed in."""
    digest = hashlib.blake2b(dtype.encode(), digest_size=12)
    folder = Path(name).expanduser()
    if folder.is_dir():
        for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), folder / "config.json"]):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "blake2b").digest())
    else:
        digest.update(f"{name}@{model.config._commit_hash}".encode())
    return digest.hexdigest()


def sequence_key(prompt: Sequence[int], completion: Sequence[int]) -> bytes:
    """The address of a completion given its prompt: a digest of both token sequences."""
    digest = hashlib.blake2b(len(prompt).to_bytes(8, "little"), digest_size=16)
    digest.update(np.asarray(prompt, dtype=np.int32).tobytes())
    digest.update(np.asarray(completion, dtype=np.int32).tobytes())
    return digest.digest()


def _row_tokens(row: dict[str, Any], roles: Sequence[str]) -> int:
    return len(row["prompt"]) + sum(len(c) for role in roles for c in row[role])


def _cut(logps: np.ndarray, rows: Sequence[dict[str, Any]], roles: Sequence[str]) -> list[tuple[bytes, np.ndarray]]:
    """The [N] log-probs of a batch as (key, values) per completion, in the batch's order: role, row, completion."""
    out, at = [], 0
    for role in roles:
        for row in rows:
            for completion in row[role]:
                out.append((sequence_key(row["prompt"], completion), logps[at : at + len(completion)]))
                at += len(completion)
    return out


def _write_shard(folder: Path, entries: list[tuple[bytes, np.ndarray]]) -> None:
    tensors = {
        "keys": np.frombuffer(b"".join(key for key, _ in entries), dtype=np.uint8).reshape(-1, 16),
        "lengths": np.array([len(values) for _, values in entries], dtype=np.int64),
        "logps": np.concatenate([values for _, values in entries]).astype(np.float32),
    }
    digest = hashlib.blake2b(tensors["logps"].tobytes()).hexdigest()
    with replacing(folder / f"{uuid.uuid4().hex}.safetensors") as partial:
        save_file(tensors, partial, metadata={"version": _VERSION, "blake2b": digest})


def _read_shard(path: Path) -> Iterator[tuple[bytes, np.ndarray]]:
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            keys, lengths, logps = (file.get_tensor(name) for name in ("keys", "lengths", "logps"))
    except (SafetensorError, OSError) as error:
        raise UserError(f"reference: {path} is damaged ({error}); delete it and it is computed again") from None
    if metadata.get("version") != _VERSION:
        raise UserError(f"reference: {path} has version {metadata.get('version')}, this program reads {_VERSION}; delete it")
    if hashlib.blake2b(logps.tobytes()).hexdigest() != metadata.get("blake2b"):
        raise UserError(f"reference: {path} is damaged (checksum); delete it and it is computed again")
    ends = lengths.cumsum()
    for key, start, end in zip(keys, ends - lengths, ends, strict=True):
        yield key.tobytes(), logps[start:end]
