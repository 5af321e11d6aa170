"""Parameters of an objective's own: optimised apart, kept in checkpoints, absent from the model, on one process or sharded."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from exactness import compile_communication
from safetensors.torch import load_file
from tiny_models import saved
from transformers import AutoModelForCausalLM

from posttrain import learned, memory
from posttrain.check import outline
from posttrain.learned import FILE, Own
from posttrain.models import parameter_counts
from posttrain.recipe import load_run
from posttrain.records import read_metrics
from posttrain.registry import find
from posttrain.run import Prepared, execute, header, prepare
from posttrain.schema import UserError
from posttrain.trainer import Trainer

COUNT = 2 * 32 + 2 + 2 + 32 + 32
"""Parameters of one mask network for 2 layers of width 32: w, c, v, scale, shift."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny model and 16 pairs, as overrides of a run that saves its first two steps."""
    folder = saved(tmp_path_factory.mktemp("inputs"), vocab_size=4096)  # so that ZeRO-3 partitions the output head
    rows = [{"prompt": f"ab {i}?", "chosen": f"yes {i}", "rejected": f"no {i} ab"} for i in range(16)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = {"learning_rate": 1e-2, "warmup_steps": 0, "per_device_train_batch_size": 4, "logging_steps": 1, "max_steps": 3}
    train |= {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    return [f"model={folder}", f"data={folder / 'pairs.jsonl'}", *(f"train.{key}={value}" for key, value in train.items())]


def run(inputs: list[str], folder: Path, *overrides: str) -> Prepared:
    return execute(load_run("sparsepo", overrides=[*inputs, f"train.output_dir={folder}", *overrides]))


def test_optimised_apart(inputs: list[str], tmp_path: Path) -> None:
    """A group of its own with its learning rate, under the run's schedule, and its weight decay."""
    overrides = [f"train.output_dir={tmp_path}", "mask_learning_rate=0.5", "mask_weight_decay=0.25", "masks=independent"]
    trainer = prepare(load_run("sparsepo", overrides=[*inputs, *overrides])).trainer
    *others, group = trainer.create_optimizer().param_groups
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.25)
    assert sum(p.numel() for p in group["params"]) == 2 * COUNT
    rest = [p for other in others for p in other["params"]]
    assert {other["lr"] for other in others} == {1e-2}
    assert {*rest, *group["params"]} == set(trainer.model.parameters()) and not {*rest} & {*group["params"]}
    trainer.create_optimizer()
    assert len(trainer.optimizer.param_groups) == len(others) + 1
    trainer.create_scheduler(4)
    assert trainer.lr_scheduler.base_lrs[-1] == 0.5


def test_the_model_and_the_checkpoints(inputs: list[str], tmp_path: Path) -> None:
    """The weights are those of a plain model; the masks stand beside them, moved and in float32, and the header counts them."""
    done = run(inputs, tmp_path)
    plain = load_file(Path(done.run.model.name) / "model.safetensors")
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        assert load_file(folder / "model.safetensors").keys() == plain.keys()
        _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not (tmp_path / FILE).exists()
    two, three = (load_file(tmp_path / f"checkpoint-{step}" / FILE) for step in (2, 3))
    assert {name: value.shape for name, value in two.items()} == {
        "mask_w": (2, 32),
        "mask_c": (2,),
        "mask_v": (2,),
        "mask_scale": (32,),
        "mask_shift": (32,),
    }
    assert all(value.dtype == torch.float32 for value in two.values())
    assert all((two[name] - three[name]).abs().max() > 0 for name in two)
    for name, parameter in done.trainer.own.named_parameters():
        assert torch.equal(three[name], parameter.detach())
    said = header(done)
    assert said["own"] == f"{COUNT} parameters of the objective, learning rate 0.01, weight decay 0.01"
    assert said["model"].split(": ")[1].startswith(f"{parameter_counts(done.model)[0]:,} parameters")
    assert parameter_counts(done.model)[0] == COUNT + sum(value.numel() for value in plain.values())


@pytest.mark.parametrize("merge", [False, True])
def test_under_an_adapter(inputs: list[str], tmp_path: Path, merge: bool) -> None:
    """Trained and kept as well; the adapter and the merged model do not hold them."""
    run(inputs, tmp_path, "model.peft.r=2", "model.peft.lora_alpha=4", f"model.merge={str(merge).lower()}")
    two, three = (load_file(tmp_path / f"checkpoint-{step}" / FILE) for step in (2, 3))
    assert all((two[name] - three[name]).abs().max() > 0 for name in two)
    adapter = load_file(tmp_path / ("adapter" if merge else "") / "adapter_model.safetensors")
    assert adapter and all("lora_" in name for name in adapter)
    if merge:
        _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize("peft", [[], ["model.peft.r=2"]], ids=["full", "adapter"])
def test_resumed(inputs: list[str], tmp_path: Path, peft: list[str]) -> None:
    """Bitwise, and not without them."""
    whole = run(inputs, tmp_path, *peft)
    expected = load_file(tmp_path / "checkpoint-3" / FILE)
    metrics = read_metrics(tmp_path)[-2]
    resumed = run(inputs, tmp_path, *peft, f"train.resume_from_checkpoint={tmp_path / 'checkpoint-2'}")
    got = load_file(tmp_path / "checkpoint-3" / FILE)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    again = read_metrics(tmp_path)[-2]
    timed = ("tokens_per_second", "memory_gib")
    assert {k: v for k, v in again.items() if k not in timed} == {k: v for k, v in metrics.items() if k not in timed}
    (tmp_path / "checkpoint-2" / FILE).unlink()
    with pytest.raises(UserError, match=rf"^train.resume_from_checkpoint: \S+checkpoint-2 has no {FILE}, which holds the obj"):
        resumed.trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(UserError, match=rf"^train.resume_from_checkpoint: \S+checkpoint-2 cannot be continued from: {FILE}"):
        run(inputs, tmp_path, *peft, f"train.resume_from_checkpoint={tmp_path / 'checkpoint-2'}")


def test_those_of_another_shape_are_refused(tmp_path: Path) -> None:
    two = Own(find("sparsepo").learned, None, {"a": torch.zeros(2)})
    learned.save(two, tmp_path, write=True)
    with pytest.raises(UserError, match="holds parameters of another objective or model"):
        learned.load(Own(find("sparsepo").learned, None, {"a": torch.zeros(3)}), tmp_path)


def test_those_of_the_best_checkpoint(inputs: list[str], tmp_path: Path) -> None:
    """Where the run ends with the best model, its masks are the best model's, too: here the first, by a metric that grows."""
    best = ["train.load_best_model_at_end=true", "train.metric_for_best_model=eval_kl", "train.greater_is_better=false"]
    data = ["data.eval_size=4", "train.eval_strategy=steps", "train.eval_steps=1", "train.save_steps=1"]
    done = run(inputs, tmp_path, *best, *data)
    chosen = Path(done.trainer.state.best_model_checkpoint)
    assert chosen.name == "checkpoint-1"
    for name, value in load_file(chosen / FILE).items():
        assert torch.equal(dict(done.trainer.own.named_parameters())[name], value)


def test_a_deepspeed_optimizer_is_refused() -> None:
    """It would put all parameters into one group."""
    plugin = SimpleNamespace(deepspeed_config={"optimizer": {"type": "AdamW"}})
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    trainer = SimpleNamespace(is_deepspeed_enabled=True, accelerator=accelerator, objective=find("sparsepo"))
    with pytest.raises(UserError, match=r"^train.deepspeed: leave `optimizer` out of its configuration"):
        Trainer._keep(trainer, None)


def test_a_dead_mask_is_warned_of_once(inputs: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One whose layers all vote against: it is 0 at every token, stays so, and the loss is log 2."""
    prepared = prepare(load_run("sparsepo", overrides=[*inputs, f"train.output_dir={tmp_path}"]))
    with torch.no_grad():
        prepared.trainer.own.mask_v.fill_(-1)
    with caplog.at_level(logging.WARNING, logger="posttrain"):
        prepared.trainer.train()
    said = [record.getMessage() for record in caplog.records if "is 0 at every token" in record.getMessage()]
    assert len(said) == 1 and said[0].startswith("step 1: mask is 0 at every token")
    losses = [line["loss"] for line in read_metrics(tmp_path) if "loss" in line]
    assert losses == pytest.approx([0.693147] * 3, abs=1e-6)


def test_predicted_memory_counts_them(inputs: list[str]) -> None:
    """Their numbers, and the states of 2 layers of width 32 for 10 tokens, as computed and in float32."""
    ours = parameter_counts(outline(load_run("sparsepo", overrides=inputs)))
    plain = parameter_counts(outline(load_run("tdpo", overrides=inputs)))
    assert [one - other for one, other in zip(ours, plain, strict=True)] == [COUNT, COUNT]
    of = memory.Shape(
        parameters=1, trainable=1, parameter_bytes=4, compute_bytes=2, layers=2, hidden=32, kept=0, tokens=10, states=True
    )
    assert memory.predict(of)["states"] == 10 * 2 * 32 * 6
    assert memory.predict(dataclasses.replace(of, states=False))["states"] == 0


@pytest.mark.multi
def test_fully_sharded(tmp_path: Path) -> None:
    """FSDP2 on two processes: masks, their gradients, what is written and what is read are those of whole parameters."""
    script = Path(__file__).with_name("fully_sharded.py")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
        str(tmp_path),
    ]
    got = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert got.returncode == 0, got.stderr[-3000:]
    assert (tmp_path / FILE).is_file()


@pytest.mark.multi
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize("stage", [2, 3])
def test_sharded(inputs: list[str], tmp_path: Path, stage: int) -> None:
    """Two processes of 2 rows under ZeRO are one of 4: the same losses, the same masks, and a plain model."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    alone, apart = tmp_path / "alone", tmp_path / "apart"
    run(inputs, alone)
    words = [word for override in inputs for word in (f"--{override.partition('=')[0]}", override.partition("=")[2])]
    words += ["--train.output_dir", str(apart), "--train.per_device_train_batch_size", "2"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    compile_communication(environment)
    command = [sys.executable, "-m", "posttrain", "sparsepo", *words, "--launch", f"zero{stage}", "--processes", "2"]
    got = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert got.returncode == 0, got.stderr[-3000:]
    losses = [[line["loss"] for line in read_metrics(folder) if "loss" in line] for folder in (alone, apart)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    started, expected = (load_file(alone / f"checkpoint-{step}" / FILE) for step in (2, 3))
    sharded = get_fp32_state_dict_from_zero_checkpoint(str(apart / "checkpoint-3"))
    for name, values in expected.items():
        torch.testing.assert_close(sharded[f"{learned.NAME}.{name}"], values, atol=2e-4, rtol=0)
        assert (values - started[name]).abs().max() > 1e-3
    assert load_file(apart / "model.safetensors").keys() == load_file(alone / "model.safetensors").keys()
