"""Training on rounds of rollouts, killed by SIGKILL in every phase of a step: the same command ends with the same numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from soak import compare
from tiny import tiny_tokenizer
from tiny_models import tiny

from posttrain.run import execute, load_run
from posttrain.transcript import read_transcript

HERE = Path(__file__).parent
KILLS = [
    ["posttrain.engines.hf", "HFEngine._sample", 2, "before"],
    ["posttrain.steps", "StepTrainer._scored", 1, "before"],
    ["posttrain.steps", "StepTrainer._scored", 1, "after"],
    ["posttrain.transcript", "Transcript.add", 1, "after"],
    ["posttrain.trainer", "Trainer.compute_loss", 1, "after"],
    ["posttrain.rounds", "Round.save", 1, "before"],
    ["posttrain.checkpoints", "write_manifest", 1, "before"],
    ["posttrain.checkpoints", "write_manifest", 1, "after"],
    ["posttrain.trainer", "Trainer.compute_loss", 2, "after"],
    ["posttrain.checkpoints", "write_manifest", 1, "after"],
    ["posttrain.engines.hf", "HFEngine._sample", 1, "after"],
    ["posttrain.steps", "StepTrainer._lesson", 1, "after"],
    ["posttrain.run", "export", 1, "before"],
    ["posttrain.run", "export", 1, "after"],
]
"""Rounds of two steps and, where the epoch ends, of one, each learned from twice, a checkpoint every second step: nothing is
saved before the eighth kill, which comes in the middle of the first round; the tenth is at its end."""


def words(folder: Path, output: Path, method: list[str]) -> list[str]:
    """Eight steps of four prompts, three completions each, sampled and learned from in two parts."""
    settings = {
        "imports": "[sampled]",
        "model": folder / "model",
        "data": folder / "rows.jsonl",
        "data.max_length": 64,
        "reward": "sampled:spread",
        "rollouts.group_size": 3,
        "rollouts.every": 2,
        "rollouts.epochs": 2,
        "sampling.max_new_tokens": 6,
        "engine.batch_size": 16,
        "train.output_dir": output,
        "train.max_steps": 8,
        "train.save_steps": 2,
        "train.logging_steps": 1,
        "train.learning_rate": 1e-3,
        "train.per_device_train_batch_size": 2,
        "train.gradient_accumulation_steps": 2,
        "train.use_cpu": "true",
    }
    return [*method, *(f"{key}={value}" for key, value in settings.items())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and prompts."""
    root, tokenizer = tmp_path_factory.mktemp("killed"), tiny_tokenizer()
    tiny("llama", vocab_size=len(tokenizer), eos_token_id=4).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    rows = [{"prompt": f"ab {i}?", "bonus": i} for i in range(11)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [["superhf"], ["rlhf", "advantage=gae", "kl_target=5", "kl_horizon=60"]], ids=["superhf", "rlhf"]
)
def test_killed_in_every_phase_it_ends_with_the_same_numbers(method: list[str], folder: Path, tmp_path: Path) -> None:
    name, *settings = words(folder, tmp_path / "whole", method)
    execute(load_run(name, None, settings))
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    asked = json.dumps({"words": words(folder, tmp_path / "killed", method), "places": KILLS})
    command, environment = [sys.executable, HERE / "killed.py", asked], {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    compare(tmp_path / "whole", tmp_path / "killed")
    written = read_transcript(tmp_path / "killed")
    assert written == read_transcript(tmp_path / "whole")
    assert [line["step"] for line in written] == [0] * 8 + [4] * 3 + [6] * 8
