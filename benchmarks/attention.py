"""Rows that share prompts against separate sequences, with the attention that suits each: forward and backward of a decoder.

    python -m benchmarks.attention [--device cuda] [--trees 16] [--prompt 512] [--completion 256] [--branches 2,8]

Forms: `tree/flex` (block masks, one row), `tree/sdpa` (a dense boolean mask), `separate/sdpa` (padded rows, one a completion)
and `separate/flash` (the same sequences behind one another without padding, with flash-attention; where flash_attn
is installed). flex and flash run on GPUs only. The decoder has random weights in the shape of Llama-3.2-1B, or of `--hidden`,
`--layers`, `--heads`. Making the masks is part of the time. The forms alternate in one process after a warm-up of each, which
compiles; the table gives medians and ratios to `separate/sdpa`. All give the hidden states where completions are predicted and
get the same upstream gradients; if what comes out differs by more than the dtype explains, the run ends with status 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from posttrain.trees import Batch, TreeCollator, attention, attention_scale, row_multiple

FORMS = ("separate/sdpa", "separate/flash", "tree/sdpa", "tree/flex")
IMPLEMENTATIONS = {"sdpa": "sdpa", "flash": "flash_attention_2", "flex": "flex_attention"}
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
"""Relative, of the norms of two forms."""

Step = Callable[[], tuple[Tensor, Tensor]]


def decoder(options: argparse.Namespace, device: str) -> LlamaModel:
    """A decoder with random weights, no output head."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=max(options.heads // 4, 1),
        max_position_embeddings=options.prompt + options.completion,
    )
    torch.manual_seed(0)
    return LlamaModel(config).to(device, getattr(torch, options.dtype))


def rows(options: argparse.Namespace, branches: int) -> list[dict[str, list]]:
    """Prompts and completions of random tokens; lengths between half of what was asked for and all of it."""
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> list[int]:
        drawn = int(torch.randint(max(length // 2, 1), length + 1, (), generator=generator))
        return torch.randint(0, 1024, (drawn,), generator=generator).tolist()

    made = [(ids(options.prompt), [ids(options.completion) for _ in range(branches)]) for _ in range(options.trees)]
    return [{"prompt": prompt, "all": completions} for prompt, completions in made]


def hidden_states(model: LlamaModel, batch: Batch, form: str) -> Tensor:
    """[N, H] where completions are predicted."""
    layout, kind = form.split("/")
    if kind != "flash":
        inputs = attention(model.config, batch["tree"], batch["branch"], batch["position_ids"], layout)
        hidden = model(input_ids=batch["input_ids"], use_cache=False, **inputs).last_hidden_state.flatten(0, 1)
        return hidden.index_select(0, batch["gather"])
    real = batch["tree"].flatten() > 0  # [R * T]
    ids, position = (batch[name].flatten()[real][None] for name in ("input_ids", "position_ids"))
    hidden = model(input_ids=ids, position_ids=position, use_cache=False).last_hidden_state[0]
    return hidden.index_select(0, (real.cumsum(0) - 1)[batch["gather"]])


def step(model: LlamaModel, made: list[dict[str, list]], form: str) -> Step:
    """Forward and backward in one form: what to call for (hidden states, gradient of the embedding)."""
    layout, kind = form.split("/")
    device = model.device
    model.set_attn_implementation(IMPLEMENTATIONS[kind])
    collate = TreeCollator(
        ["all"], layout=layout, attention_scale=attention_scale(model.config), multiple=row_multiple(model.config)
    )
    batch = {name: tensor.to(device) for name, tensor in collate(made).items()}
    upstream = torch.randn(len(batch["gather"]), model.config.hidden_size, generator=torch.Generator().manual_seed(2))
    upstream = upstream.to(device, model.dtype)

    def call() -> tuple[Tensor, Tensor]:
        model.set_attn_implementation(IMPLEMENTATIONS[kind])
        model.zero_grad()
        hidden = hidden_states(model, {name: tensor.clone() for name, tensor in batch.items()}, form)  # a new batch: new masks
        hidden.backward(upstream)
        return hidden.detach(), model.get_input_embeddings().weight.grad

    return call


def measured(call: Step, cuda: bool) -> tuple[float, int]:
    """Seconds, and bytes held at most on a GPU beyond what was held before (0 on a CPU)."""
    if not cuda:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start, 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() - before


def compare(
    options: argparse.Namespace, model: nn.Module, branches: int, forms: list[str]
) -> tuple[list[dict[str, Any]], bool]:
    """A line of the table for each form, and whether they agree."""
    made, cuda = rows(options, branches), model.device.type == "cuda"
    steps = {form: step(model, made, form) for form in forms}
    norms = {form: [float(tensor.double().norm()) for tensor in call()] for form, call in steps.items()}
    runs = [{form: measured(call, cuda) for form, call in steps.items()} for _ in range(options.rounds)]
    found = []
    for form in forms:
        seconds, peak = (statistics.median(run[form][i] for run in runs) for i in (0, 1))
        found.append({"branches": branches, "form": form, "seconds": seconds, "peak": peak, "norms": norms[form]})
    for row in found:
        row["ratio"] = row["seconds"] / found[0]["seconds"]
    first = norms[forms[0]]
    return found, all(
        abs(a - b) <= TOLERANCE[options.dtype] * a for its in norms.values() for a, b in zip(first, its, strict=True)
    )


def main() -> None:
    """Measure all forms and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--trees", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=512, help="longest prompt")
    parser.add_argument("--completion", type=int, default=256, help="longest completion")
    parser.add_argument("--branches", default="2,8", help="completions of a prompt")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16", choices=TOLERANCE)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", help="also write the lines to this file")
    options = parser.parse_args()
    cuda = options.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU")
    there = {"separate/flash": cuda and importlib.util.find_spec("flash_attn") is not None, "tree/flex": cuda}
    forms = [form for form in FORMS if there.get(form, True)]
    model = decoder(options, options.device)
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    shape = f"H = {options.hidden}, {options.layers} layers, {options.heads} heads, {options.dtype}"
    data = f"{options.trees} prompts of up to {options.prompt}, completions of up to {options.completion}"
    print(f"{shape}; {data}; {name}; torch {torch.__version__}; medians of {options.rounds} alternating rounds.\n")
    print("| completions | form | ms | x separate/sdpa | peak MiB |\n|---|---|---|---|---|", flush=True)
    lines, differ = [], []
    for branches in (int(number) for number in options.branches.split(",")):
        found, agree = compare(options, model, branches, forms)
        for row in found:
            peak = f"{row['peak'] / 2**20:.0f}" if cuda else "-"
            print(f"| {branches} | {row['form']} | {1000 * row['seconds']:.1f} | {row['ratio']:.2f} | {peak} |", flush=True)
        lines += found
        differ += [] if agree else [str(branches)]
    if options.json:
        Path(options.json).write_text(json.dumps({"options": vars(options), "rows": lines}, indent=1))
    if differ:
        sys.exit(f"the forms disagree for {', '.join(differ)} completions")


if __name__ == "__main__":
    main()
