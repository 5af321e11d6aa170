"""Trees in rows: one prompt and the completions that branch from it, packed so that a shared prompt is computed once.

A row is `[prompt | completion 1 | completion 2 | ...]`, one tree after the other. Token k attends to token q when q does not
come after it, both are in the same tree, and q is in the prompt or in k's own branch; positions of every branch continue from
the end of the prompt. The last token of a completion is predicted but never read, so it has no place in the row. Where a model
cannot share, the `separate` layout holds one prompt and completion per row and yields the same batch.

Letters in shape comments: R rows, T tokens of the longest row, N completion tokens of all roles, B completions of one role.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from peft import PeftModel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedConfig, PreTrainedModel

if TYPE_CHECKING:
    from .foreign import Retold

Layout = Literal["tree", "separate"]
Row = Mapping[str, Any]
Batch = dict[str, torch.Tensor]
Lookup = Callable[[Sequence[int], Sequence[int]], Mapping[str, np.ndarray]]

_ATTENTION_RATE = 0.6
"""Operations per second of masked attention, relative to those of a matrix product. Fitted to SmolLM2-135M, forward and
backward, sdpa with a boolean mask, float32 on a CPU: rows of 256 to 2048 tokens at equal totals."""


_BLOCK = 128
"""Tokens of a block of flex_attention, to both sides."""


@dataclass(frozen=True)
class _Unit:
    """What is laid into a row in one piece: a prompt and some of its completions."""

    prompt: np.ndarray
    """[P] ids."""

    branches: list[tuple[int, np.ndarray]]
    """Number of the completion in the batch and its ids as far as they are read, in the order in which they are laid."""

    def __len__(self) -> int:
        return len(self.prompt) + sum(len(ids) for _, ids in self.branches)


@dataclass
class TreeCollator:
    """Lays rows of data into a batch: `collator(rows) -> dict of tensors`, deterministic.

    A row holds `prompt` (ids, not empty), for each role a list of completions (ids) and one number per column. A completion
    without ids has its place among the lengths and nothing in the rows. The batch holds, int64 unless said:

    - `input_ids`, `position_ids`, `tree`, `branch`, each [R, T]. `tree` counts from 1 within a row, 0 is padding; `branch` is 0
      in the prompt and counts from 1 within a tree.
    - `gather` [N]: index into the flattened [R * T] of the position that predicts each completion token; `targets` [N]: that
      token. Role after role, within a role completion after completion in the order of the rows.
    - `lengths.<role>` [B]: tokens of each completion.
    - `row.<column>` [rows]: the column, in the dtype of its numbers.
    - `token.<name>` [N]: the numbers of each token, of which a row holds under the same name [T] for each completion.
    - What `reference` gives, if it is given, [N] or [N, k], in its dtype.
    """

    roles: Sequence[str]
    """Names of the roles, in the order of the objective's family."""

    columns: Sequence[str] = ()
    """Numbers per row that the objective reads beside the completions."""

    layout: Layout = "tree"
    """`tree` shares a prompt among its completions and packs trees into rows; `separate` gives every completion a row."""

    tokens: Sequence[str] = ()
    """Numbers per token that the objective reads, of rows with one role."""

    reference: Lookup | None = None
    """What was kept of the reference for a prompt and a completion, by name, the first dimension being the completion's tokens:
    `reference_logps`, or what a cached teacher says."""

    attention_scale: float = 2048.0
    """Row length at which attention takes as long as the rest of the model; the function of this name estimates it."""

    whole: bool = False
    """For a model that scores completions: they are read through their last token, and `gather` and `targets`, [N] with N the
    number of completions, are the place of that token and the token."""

    multiple: int = 1
    """Row lengths are rounded up to a multiple of this; `row_multiple` knows what suits a model."""

    def __call__(self, rows: Sequence[Row]) -> Batch:
        prompts = [np.asarray(row["prompt"], dtype=np.int64) for row in rows]
        owners, completions, batch = [], [], {}
        for role in self.roles:
            counts = [len(row[role]) for row in rows]
            owners += np.repeat(np.arange(len(rows)), counts).tolist()
            new = [np.asarray(completion, dtype=np.int64) for row in rows for completion in row[role]]
            batch[f"lengths.{role}"] = torch.tensor([len(completion) for completion in new], dtype=torch.int64)  # [B]
            completions += new
        assert all(len(ids) for ids in (*prompts, *(completions if self.whole else ()))), "an empty prompt or completion"
        batch |= self._lay(self._units(prompts, owners, completions), completions)
        for column in self.columns:
            batch[f"row.{column}"] = torch.tensor([row[column] for row in rows])  # [rows]
        for name in (f"token.{name}" for name in self.tokens):
            values = [torch.as_tensor(one) for row in rows for one in row[name]]
            batch[name] = torch.cat([torch.empty(0, dtype=values[0].dtype if values else None), *values])  # [N]
        if self.reference is not None:
            asked = [(rows[owner]["prompt"], ids.tolist()) for owner, ids in zip(owners, completions, strict=True)]
            asked = asked or [([], [])]
            found = [self.reference(prompt, ids) for prompt, ids in asked]
            for name in found[0]:
                values = [one[name] for one in found]
                assert [len(one) for one in values] == [len(ids) for _, ids in asked], f"{name} of another length"
                batch[name] = torch.from_numpy(np.concatenate(values))  # [N] or [N, k]
        return batch

    def _units(self, prompts: list[np.ndarray], owners: list[int], completions: list[np.ndarray]) -> list[_Unit]:
        read = [
            (owner, (slot, ids if self.whole else ids[:-1]))
            for slot, (owner, ids) in enumerate(zip(owners, completions, strict=True))
            if len(ids)
        ]
        if self.layout == "separate":
            return [_Unit(prompts[owner], [one]) for owner, one in read]
        units = [_Unit(prompt, []) for prompt in prompts]
        for owner, one in read:
            units[owner].branches.append(one)
        return [unit for unit in units if unit.branches]

    def _lay(self, units: list[_Unit], completions: list[np.ndarray]) -> Batch:
        units = units or [_Unit(np.zeros(1, dtype=np.int64), [])]  # so that a model can read a batch without rows
        sizes = [len(unit) for unit in units]
        packed = pack(sizes, self.attention_scale) if self.layout == "tree" else [[number] for number in range(len(units))]
        longest = max(sum(sizes[number] for number in members) for members in packed)
        width = -(-longest // self.multiple) * self.multiple  # T
        ids, position, tree, branch = np.zeros((4, len(packed), width), dtype=np.int64)
        none = np.empty(0, dtype=np.int64)
        gather: list[np.ndarray] = [none] * len(completions)
        for row, members in enumerate(packed):
            at = 0
            for number, unit in enumerate((units[member] for member in members), start=1):
                size, start = len(unit.prompt), at
                ids[row, at : at + size] = unit.prompt
                position[row, at : at + size] = np.arange(size)
                at += size
                for label, (slot, read) in enumerate(unit.branches, start=1):
                    inner = len(read)
                    ids[row, at : at + inner] = read
                    position[row, at : at + inner] = np.arange(size, size + inner)
                    branch[row, at : at + inner] = label
                    places = np.concatenate(([start + size - 1], np.arange(at, at + inner)))
                    gather[slot] = row * width + (places[-1:] if self.whole else places)
                    at += inner
                tree[row, start:at] = number
        tensors = {"input_ids": ids, "position_ids": position, "tree": tree, "branch": branch}  # [R, T] each
        targets = [ids[-1:] for ids in completions] if self.whole else completions
        tensors |= {"gather": np.concatenate([none, *gather]), "targets": np.concatenate([none, *targets])}  # [N] each
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in tensors.items()}


@dataclass
class Collator:
    """Rows -> one batch: what is trained on and, under keys of their own, the completions that are read before a step.

    Fillers (None) among the rows are left out. A batch without rows is one token that nothing is said of: N = 0.
    """

    main: TreeCollator
    """Lays the trained roles."""

    early: TreeCollator | None
    """Lays the early ones, each with its prompt."""

    retold: Retold | None = None
    """Lays the rows as a teacher with another tokenizer reads them, under keys of its own."""

    both: TreeCollator | None = None
    """Lays the trained roles and then the early ones together, so that a live reference reads a prompt once."""

    @property
    def layout(self) -> Layout:
        """The layout of all."""
        return self.main.layout

    @layout.setter
    def layout(self, layout: Layout) -> None:
        for one in (self.main, self.early, self.both, self.retold and self.retold.collator):
            if one is not None:
                one.layout = layout

    def __call__(self, rows: Sequence[Row | None]) -> Batch:
        rows = [row for row in rows if row is not None]
        batch = self.main(rows)
        for part, collator in (("early", self.early), ("both", self.both)):
            if collator is not None:
                batch |= {f"{part}.{name}": tensor for name, tensor in collator(rows).items()}
        if self.retold is not None:
            batch |= self.retold(rows)
        return batch

    @staticmethod
    def part(batch: Batch, which: str) -> Batch:
        """A part of a batch, `early` or `both`, as a batch; empty where it is not laid."""
        return {name.removeprefix(f"{which}."): tensor for name, tensor in batch.items() if name.startswith(f"{which}.")}


def prompts_of(batch: Batch) -> list[list[int]]:
    """The prompts in a batch, one a tree; their order is that of the trees in it, not of the rows it was made from."""
    found: list[list[int]] = []
    if not len(batch["targets"]):
        return found
    for ids, tree, branch in zip(batch["input_ids"], batch["tree"], batch["branch"], strict=True):
        found += [ids[(tree == number) & (branch == 0)].tolist() for number in range(1, int(tree.max()) + 1)]
    return found


def pack(sizes: Sequence[int], scale: float) -> list[list[int]]:
    """Distribute trees over rows so that a forward of the padded rows costs least.

    The cost of R rows of length T is R * T * (1 + T / scale): one part per token, padding included, one for attention over T.
    For each R the longest tree goes first, each to the shortest row so far; the cheapest R wins, of equal ones the smallest.

    Args:
        sizes: tokens of each tree.
        scale: row length at which the two parts are equal.

    Returns:
        Per row the numbers of its trees, ascending.
    """
    order = sorted(range(len(sizes)), key=lambda number: (-sizes[number], number))
    best, least = [], float("inf")
    for count in range(1, len(sizes) + 1):
        rows: list[list[int]] = [[] for _ in range(count)]
        loads = [0] * count
        for number in order:
            shortest = loads.index(min(loads))
            rows[shortest].append(number)
            loads[shortest] += sizes[number]
        cost = count * max(loads) * (1 + max(loads) / scale)
        if cost < least:
            best, least = rows, cost
    return sorted(sorted(members) for members in best)


def attention_scale(config: PreTrainedConfig) -> float:
    """Row length at which attention over a dense mask takes as long as the rest of the decoder layers.

    Per token and layer the matrices cost 2 * (4 H^2 + 3 H I) operations and the attention 4 * H * T (H hidden, I intermediate
    size: in a mixture the sum over the experts that a token visits). Configurations that name no I have two matrices of 4 H.
    With flex_attention a row's length costs nothing, as blocks that nobody may see are not computed: infinite.
    """
    if config.get_text_config()._attn_implementation == "flex_attention":
        return math.inf
    settings = config.get_text_config().to_dict()
    hidden = config.get_text_config().hidden_size
    inner = settings.get("intermediate_size") or 8 * hidden / 3
    if settings.get("moe_intermediate_size") and settings.get("num_experts_per_tok"):
        inner = settings["moe_intermediate_size"] * settings["num_experts_per_tok"]
    return _ATTENTION_RATE * (4 * hidden + 3 * inner) / 2


def row_multiple(config: PreTrainedConfig) -> int:
    """What row lengths should be a multiple of: blocks of flex_attention, the alignment of masks on a GPU, else anything."""
    if config.get_text_config()._attn_implementation == "flex_attention":
        return _BLOCK
    return 8 if torch.cuda.is_available() else 1


def padding(batch: Batch) -> int:
    """Positions of the rows that hold no token."""
    return int((batch["tree"] == 0).sum())


@torch.inference_mode(False)  # a mask made for a reference may be the policy's, whose backward reads it
def attention(
    config: PreTrainedConfig, tree: torch.Tensor, branch: torch.Tensor, position: torch.Tensor, layout: Layout
) -> dict[str, Any]:
    """The arguments of the model's forward, beside `input_ids`, that make it see the rows as they are meant.

    Args:
        config: configuration of the model, as it was loaded (the attention implementation is read from it).
        tree, branch, position: [R, T] int64 of a batch, on the model's device.
        layout: how the batch was laid.

    Returns:
        For `separate` the 2-D `attention_mask`; positions are the model's own. For `tree` `position_ids` and a 4-D
        `attention_mask` [R, 1, T, T]: boolean for sdpa, additive for eager, a BlockMask for flex_attention; a dict of them by
        layer type where the configuration names those. A window counts positions, not places in the row. Padding attends to
        itself alone, which keeps it free of NaN.
    """
    if layout == "separate":
        return {"attention_mask": (tree > 0).long()}
    config = config.get_text_config()
    settings = vars(config)
    window, kinds = settings.get("sliding_window"), settings.get("layer_types")
    padded = -1 - torch.arange(tree.shape[1], device=tree.device, dtype=torch.int32)  # [T] padding: each place its own tree
    root = torch.where(tree > 0, tree.int() << 16, padded)  # [R, T]
    own = torch.where(tree > 0, root + branch.int(), padded)  # [R, T]
    place = position.int()

    def build(window: int | None) -> torch.Tensor | BlockMask:
        if config._attn_implementation == "flex_attention":
            known = _block_masks.setdefault(tree, {})
            which = branch, position, window
            if which not in known:
                known[which] = _block_mask(own, root, place, window)
            return known[which]
        return _dense_mask(own, root, place, window, config)

    if kinds is None:
        return {"position_ids": position, "attention_mask": build(window)}
    masks = {"full_attention": build(None)}
    if "sliding_attention" in kinds:
        masks["sliding_attention"] = build(window)
    return {"position_ids": position, "attention_mask": masks}


def _dense_mask(
    own: torch.Tensor, root: torch.Tensor, place: torch.Tensor, window: int | None, config: PreTrainedConfig
) -> torch.Tensor:
    key = own[:, None, :]
    seen = ((key == own[:, :, None]) | (key == root[:, :, None])).tril_()  # [R, T, T]
    if window is not None:
        seen &= place[:, :, None] - place[:, None, :] < window
    seen = seen[:, None]  # [R, 1, T, T]
    if config._attn_implementation != "eager":
        return seen
    dtype = config.dtype or torch.float32
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


@functools.cache
def _maker(device: str) -> Callable[..., BlockMask]:
    """`create_block_mask`; on GPUs compiled, once for all shapes, as plain it takes [R, T, T] memory."""
    return torch.compile(create_block_mask, dynamic=True) if device == "cuda" else create_block_mask


_block_masks: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""`tree` of a batch -> (branch, position, window), by identity -> its mask: that of the policy is the reference's, too."""


def _block_mask(own: torch.Tensor, root: torch.Tensor, place: torch.Tensor, window: int | None) -> BlockMask:
    def seen(row: torch.Tensor, _head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        same = (own[row, key] == own[row, query]) | (own[row, key] == root[row, query])
        near = True if window is None else place[row, query] - place[row, key] < window
        return same & (key <= query) & near

    rows, length = own.shape
    return _maker(own.device.type)(seen, B=rows, H=None, Q_LEN=length, KV_LEN=length, device=own.device, BLOCK_SIZE=_BLOCK)


_SEES_MASKS = ("sdpa", "eager", "flex_attention")
_SHAREABLE_LAYERS = {"full_attention", "sliding_attention"}
_OWN_MASKS = {
    "gpt_neo": "its local attention counts row indices, not positions",
    "openai-gpt": "it takes no 4-D attention mask",
    "reformer": "it takes no 4-D attention mask",
    "xlm": "it takes no 4-D attention mask",
}


def shareable(model: torch.nn.Module) -> str | None:
    """Why the tree layout cannot be exact for a model, in words that follow "because"; None where nothing speaks against it.

    Read from the model's class and configuration, so it is a necessary condition: the trainer also compares the two layouts on
    numbers before it shares.
    """
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return "its adapter puts virtual tokens before the prompt"
    base = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    config = base.config.get_text_config()
    settings = config.to_dict()
    kinds = set(settings.get("layer_types") or ()) - _SHAREABLE_LAYERS
    if config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if base._is_stateful:
        return "its layers carry a recurrent state along the row"
    if kinds:
        return f"it has layers of type {', '.join(sorted(kinds))}"
    if settings.get("attention_chunk_size"):
        return "its attention is cut into chunks"
    if config.model_type in _OWN_MASKS:
        return _OWN_MASKS[config.model_type]
    if settings.get("alibi"):
        return "it derives positions (ALiBi) from row indices"
    if "position_ids" not in inspect.signature(type(base).forward).parameters:
        return "its forward takes no position ids"
    if config._attn_implementation not in _SEES_MASKS:
        return f"{config._attn_implementation} ignores 4-D attention masks (use sdpa, eager or flex_attention)"
    return None
