"""How much more than the mean the most loaded process has to compute in a step, rows dealt by position and by length.

    python -m benchmarks.balance --model <folder> --data pairs.jsonl [--processes 2 4 8] [--batch 1 4 8] [--accumulation 1 4]

Of the model only the tokenizer is read, and nothing is trained. Steps are those of a training: rows in random order, batches of
`posttrain.loading`. `tree` counts the tokens of trees. `separate` counts positions where every sequence is filled up to the
longest of its micro-batch, relative to the tokens of all; there only several micro-batches a step leave a choice.
"""

from __future__ import annotations

import argparse
import itertools
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.data import RandomSampler
from transformers import AutoTokenizer

from posttrain.balance import ByLength, tokens_of
from posttrain.data import PAIRED, load
from posttrain.loading import EvenBatches, by_position
from posttrain.settings import DataConfig

from .machine import stamp


def filled(lengths: np.ndarray, batch: list[int]) -> int:
    """Positions of a micro-batch whose sequences are filled up."""
    return lengths[batch].max() * lengths.shape[1] * len(batch)


def shares(lengths: np.ndarray, layout: str, by_length: bool, processes: int, batch: int, accumulation: int) -> np.ndarray:
    """[steps] what the most loaded process computes, relative to the mean of all tokens.

    Args:
        lengths: [rows, roles] tokens of each prompt with one completion, for `separate`; [rows, 1] of each tree.
        layout: counts and deals.
        by_length: not by position.
        processes, batch, accumulation: how a step is split.
    """
    deal = ByLength(lengths.sum(1), SimpleNamespace(layout=layout)) if by_length else by_position
    sampler = RandomSampler(range(len(lengths)), generator=torch.Generator().manual_seed(0))
    batches = EvenBatches(sampler, batch, processes, accumulation=accumulation, drop_last=True, deal=deal)
    found, size = [], processes * accumulation
    for step in zip(*[iter(batches)] * size, strict=False):  # what fills no step stays away
        costs = [filled(lengths, one) if layout == "separate" else lengths[one].sum() for one in step]
        most = max(sum(costs[process::processes]) for process in range(processes))
        found.append(most * processes / sum(lengths[one].sum() for one in step))
    return np.array(found)


def least(lengths: np.ndarray, processes: int, batch: int, accumulation: int) -> float:
    """What no dealing of whole rows goes below, mean over the steps: the mean of all, or the longest row."""
    sampler = RandomSampler(range(len(lengths)), generator=torch.Generator().manual_seed(0))
    rows, size = np.array(list(sampler)), processes * batch * accumulation
    steps = lengths[:, 0][rows[: len(rows) // size * size]].reshape(-1, size)
    return np.maximum(steps.max(1) * processes / steps.sum(1), 1).mean()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--accumulation", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--max-length", type=int, default=1024)
    options = parser.parse_args()
    config = DataConfig(name=options.data, max_length=options.max_length)
    rows = load(config, AutoTokenizer.from_pretrained(options.model), PAIRED).train
    trees = tokens_of(rows, PAIRED)[:, None]
    sides = np.stack([tokens_of(rows, [role]) for role in PAIRED], axis=1)
    print(stamp("datasets"))
    p50, p95, longest = np.quantile(trees, (0.5, 0.95, 1))
    print(f"{len(rows)} pairs; tokens of a tree: p50 {p50:.0f}, p95 {p95:.0f}, max {longest:.0f}")
    print("| processes | batch | accumulation | by position | by length | least possible | separate, by position | by length |")
    print("|---|---|---|---|---|---|---|---|")
    for split in itertools.product(options.processes, options.batch, options.accumulation):
        columns = [(trees, "tree", False), (trees, "tree", True), None, (sides, "separate", False), (sides, "separate", True)]
        values = [least(trees, *split) if one is None else shares(*one, *split).mean() for one in columns]
        print(f"| {' | '.join(map(str, split))} | {' | '.join(f'{value:.2f}' for value in values)} |", flush=True)


if __name__ == "__main__":
    main()
