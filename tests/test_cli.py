"""The command line: mistakes are one line and status 2, help is read from the declarations, a run leaves what it says."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from click.testing import CliRunner, Result
from exactness import compile_communication
from huggingface_hub import HfApi
from safetensors.torch import load_file
from tiny import tiny_tokenizer
from tiny_models import saved

from posttrain import docs, registry, shipped
from posttrain.arguments import DEFAULTS, REFUSED, types
from posttrain.cli import main, read_words
from posttrain.models import load_policy
from posttrain.recipe import load_run
from posttrain.records import read_metrics
from posttrain.settings import ModelConfig


def invoke(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def refused(*words: object) -> str:
    """The one line that a command with a mistake in it prints."""
    result = invoke(*words)
    assert result.exit_code == 2, (result.output, result.exception)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("posttrain: error: "), result.stderr
    return lines[0].removeprefix("posttrain: error: ")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model"))


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs(count: int = 12) -> list[dict[str, object]]:
    return [{"prompt": f"ab {i}?", "chosen": f"yes {i}", "rejected": f"no {i} ab"} for i in range(count)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", pairs())


@pytest.fixture
def small(model: Path, rows: Path, tmp_path: Path) -> list[object]:
    """The words of a run of 4 steps."""
    words = ["dpo", "--model", model, "--data", rows, "--train.max_steps", 4, "--train.output_dir", tmp_path / "out"]
    return [*words, "--train.per_device_train_batch_size", 2, "--train.logging_steps", 1, "--data.max_length", 200]


# What a mistake says


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--bata", "1"], ["unknown setting 'bata'; did you mean beta?", "beta, divergence"]),
        (["--model.nme", "x"], ["model: unknown key 'nme'; did you mean name?"]),
        (["--data.max_lenght", "5"], ["data: unknown key 'max_lenght'; did you mean max_length?"]),
        (["--train.epochs", "1"], ["train: unknown argument 'epochs'; did you mean num_train_epochs?"]),
        (["--train.lerning_rate", "1"], ["train: unknown argument 'lerning_rate'; did you mean learning_rate?"]),
        (["--modle", "x"], ["unknown setting 'modle'; did you mean model?"]),
        (["--output", "x"], ["unknown setting 'output'; did you mean train.output_dir?"]),
        (["--lr", "1"], ["unknown setting 'lr'; did you mean train.learning_rate or "]),
        (["--epochs", "1"], ["unknown setting 'epochs'; did you mean rollouts.epochs or train.num_train_epochs?"]),
        (
            ["--batch-size", "1"],
            ["did you mean engine.batch_size or train.per_device_eval_batch_size or train.per_device_train"],
        ),
        (["--max_lenght", "5"], ["unknown setting 'max_lenght'; did you mean data.max_length?"]),
        (["--beta", "big"], ["objective: beta = 'big'", "valid number"]),
        (["--beta", "0"], ["objective: beta = 0", "greater than 0"]),
        (["--beta", "-1"], ["objective: beta = -1", "greater than 0"]),
        (["--label_smoothing", "1.5"], ["label_smoothing = 1.5", "less than or equal to 1"]),
        (["--divergence", "jss"], ["unknown divergence; did you mean js?", "reverse_kl, forward_kl, js"]),
        (["--divergence", "alpha:1.5"], ["alpha takes its parameter after a colon, 0 < a < 1"]),
        (["--divergence", "total_variation"], ["not defined for preference learning"]),
        (["--train.max_steps", "many"], ["train: max_steps = 'many'", "valid integer"]),
        (["--train.bf16", "maybe"], ["train: bf16 = 'maybe'", "valid boolean"]),
        (["--train.lr_scheduler_type", "cosin"], ["train:", "cosin", "linear"]),
        (["--train.label_smoothing_factor", "0.1"], ["label_smoothing_factor = 0.1 would be ignored"]),
        (["--train.remove_unused_columns"], ["remove_unused_columns = True would be ignored"]),
        (["--train.eval_strategy", "steps"], ["eval_strategy = 'steps' needs rows"]),
        (["--layout", "forest"], ["layout = 'forest'; possible: auto, tree, separate"]),
        (["--model.dtype", "float8"], ["model: dtype = 'float8'", "'float32'"]),
        (["--reference.kind", "adapter"], ["kind = adapter needs an adapter"]),
        (["--model.merge"], ["merge = True merges an adapter"]),
        (["--imports", "[no_such_module]"], ["imports: no_such_module cannot be imported"]),
        (["--objective.name", "ipo"], ["objective.name says ipo, the command says dpo"]),
        (["one.yaml", "two.yaml"], ["'two.yaml' is neither --key value nor key=value; the recipe is one.yaml"]),
        (["none.yaml"], ["recipe none.yaml does not exist"]),
        (["--launch", "zero4"], ["--launch: 'zero4' does not exist; did you mean zero"]),
        (["--processes", "2"], ["--processes belongs to --launch"]),
        (["--train.report_to", "wandb"], ["train.report_to: wandb is not installed; pip install 'posttrain[trackers]'"]),
        (["--model.attention", "flash_attention_2"], ["flash_attn is not installed; pip install 'posttrain[flash-attn]'"]),
        (["--model", "./no/such/folder"], ["model.name: folder ./no/such/folder does not exist"]),
        (["--model.tokenizer", "./no/such"], ["model.tokenizer: folder ./no/such does not exist"]),
        (["--data", "none.jsonl"], ["data none.jsonl: no such file or folder"]),
        (["--data.max_length", "4"], ["none of 12 rows can be used", "too long", "data.max_length = 4"]),
        (["--data.streaming", "--train.max_steps", "-1"], ["max_steps is required with data.streaming"]),
        (["--train.resume_from_checkpoint"], ["holds no complete checkpoint"]),
        (["--train.resume_from_checkpoint", "./nowhere"], ["nowhere cannot be continued from: it has no manifest"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_a_mistake_is_one_line(small: list[object], words: list[str], says: list[str]) -> None:
    line = refused(*small, *words)
    for part in says:
        assert part in line


def test_a_run_without_model_or_data(model: Path) -> None:
    assert "model: name is required" in refused("dpo", "--data", "x.jsonl")
    assert "data: name is required" in refused("dpo", "--model", model)
    assert "objective.name is required" in refused("train")
    assert "command 'dop' does not exist; did you mean dpo?" in refused("dop")
    assert "objective 'magic' does not exist" in refused("train", "--objective", "magic")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("objective: {name: dpo, bata: 1}", "objective: unknown key 'bata'; did you mean beta?"),
        ("objective: dpo\nmodle: x", "unknown key 'modle'; did you mean model?"),
        ("objective: {name: dpo, beta: -0.1}", "objective: beta = -0.1: Input should be greater than 0"),
        ("objective: dpo\ntrain: {max_step: 3}", "train: unknown argument 'max_step'; did you mean max_steps?"),
        ("objective: dpo\nobjective: dpo", "not readable as YAML"),
        ("objective: {name: dpo", "not readable as YAML"),
        ("- dpo", "a recipe is a mapping"),
        ("objective: dpo\ntrain: fast", "train = 'fast': a mapping is expected"),
        ("objective: dpo\nlayout: rows", "layout = 'rows'"),
        ("objective: dpo\nmodel: {name: '${nothing}'}", "nothing"),
    ],
)
def test_a_mistake_in_a_recipe_names_the_file(tmp_path: Path, text: str, says: str) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text if "model" in text else text + "\n", encoding="utf-8")
    line = refused("train", recipe, *([] if "model" in text else ["--model", "m"]), "--data", "d")
    assert says in line and "mine.yaml" in line


def test_missing_column(small: list[object], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"question": "ab?", "good": "yes", "bad": "no"}])
    line = refused(*small, "--data", path)
    assert "chosen" in line and "good" in line and "bad" in line


def test_empty_data(small: list[object], tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("")
    assert "the file is empty" in refused(*small, "--data", tmp_path / "x.jsonl")


def test_identical_pairs_and_empty_completions_as_errors(small: list[object], tmp_path: Path) -> None:
    same = [*pairs(3), {"prompt": "ab", "chosen": "yes", "rejected": "yes"}]
    line = refused(*small, "--data", write_rows(tmp_path / "same.jsonl", same), "--data.identical", "error")
    assert "1 of 4 rows: identical, the first is row 4" in line
    empty = [*pairs(3), {"prompt": "ab", "chosen": "", "rejected": "yes"}]
    line = refused(*small, "--data", write_rows(tmp_path / "empty.jsonl", empty), "--data.empty", "error")
    assert "1 of 4 rows: empty completion, the first is row 4" in line


def test_conversations_without_a_chat_template(small: list[object], tmp_path: Path) -> None:
    say = [{"role": "user", "content": "ab?"}]
    turns = [
        {"prompt": say, "chosen": [{"role": "assistant", "content": a}], "rejected": [{"role": "assistant", "content": "no"}]}
        for a in ("yes", "ab")
    ]
    bare = saved(tmp_path / "bare", tiny_tokenizer(chat=False))
    line = refused(*small, "--model", bare, "--data", write_rows(tmp_path / "x.jsonl", turns))
    assert "model.chat_template" in line


def test_reference_with_another_tokenizer(small: list[object], tmp_path: Path) -> None:
    other = saved(tmp_path / "other")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<other>"])
    tokenizer.save_pretrained(other)
    line = refused(*small, "--reference.model", other)
    assert "another tokenizer" in line and "268 and 267 tokens, 1 differ, '<other>' for one" in line


def test_rows_beyond_the_positions_of_the_model(small: list[object], tmp_path: Path) -> None:
    rows = [{"prompt": "ab", "chosen": "z" * 300, "rejected": "no"}]
    line = refused(*small, "--data", write_rows(tmp_path / "x.jsonl", rows), "--data.max_length", 1000)
    assert "256 positions; --data.max_length 256 fits" in line


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("posttrain.recipe.load_run", interrupted)
    result = invoke("dpo")
    assert result.exit_code == 130 and result.stderr.splitlines()[-1] == "posttrain: interrupted"


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise AssertionError("ours")

    monkeypatch.setattr("posttrain.recipe.load_run", broken)
    assert isinstance(invoke("dpo").exception, AssertionError)


# What is read


def test_words() -> None:
    words = ["r.yaml", "--beta", "0.2", "--train.bf16", "--data.max-length=5", "objective.divergence=js", "--x", "-1", "--y"]
    overrides = ["beta=0.2", "train.bf16=true", "data.max_length=5", "objective.divergence=js", "x=-1", "y=true"]
    assert read_words(words) == ("r.yaml", overrides)


def test_flags_win_over_the_recipe_and_defaults_fill_in(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "objective: {name: dpo, beta: 0.3}\nmodel: org/policy\ndata: {name: org/rows, eval: other}\n"
        "train: {learning_rate: 5e-7, warmup_steps: 3, report_to: [tensorboard]}"
    )
    run = load_run(None, recipe, ["beta=0.2", "divergence=alpha:0.25", "model.peft.r=8", "reference=cached", "train.seed=7"])
    assert (run.config.beta, run.config.divergence, run.model.name, run.model.peft) == (
        0.2,
        "alpha:0.25",
        "org/policy",
        {"r": 8},
    )
    assert run.reference.kind == "cached" and run.data.eval.name == "other"
    assert run.train["learning_rate"] == 5e-7 and run.train["seed"] == 7 and run.train["report_to"] == ["tensorboard"]
    assert run.train["lr_scheduler_type"] == "cosine" and run.train["eval_strategy"] == "epoch"
    assert run.train["output_dir"] == "runs/dpo-policy-rows"
    again = tmp_path / "again.yaml"
    again.write_text(json.dumps(run.resolved()))
    assert load_run(None, again).resolved() == run.resolved()


@pytest.mark.parametrize(
    ("written", "read"),
    [("5e-7", 5e-7), ("'5e-7'", 5e-7), ("0.000001", 1e-6), ("1", 1.0)],
)
def test_numbers_as_people_write_them(written: str, read: float) -> None:
    run = load_run("dpo", None, ["model=m", "data=d", f"train.learning_rate={written}", f"beta={written}"])
    assert run.train["learning_rate"] == read and run.config.beta == read


def test_no_is_a_strategy_though_yaml_reads_false() -> None:
    run = load_run("dpo", None, ["model=m", "data=d", "train.save_strategy=no", "train.logging_strategy='no'"])
    assert run.resolved()["train"]["save_strategy"] == "no" and run.resolved()["train"]["logging_strategy"] == "no"


def test_secrets_are_left_out_of_the_resolved_run() -> None:
    run = load_run("dpo", None, ["model=m", "data=d", "train.hub_token=hf_secret"])
    assert run.train["hub_token"] == "hf_secret" and "hf_secret" not in json.dumps(run.resolved())


def test_defaults_and_refusals_are_of_arguments_that_exist() -> None:
    assert {*DEFAULTS, *REFUSED} <= types().keys()
    run = load_run("dpo", None, ["model=m", "data=d"])
    from transformers import TrainingArguments

    fresh = TrainingArguments(output_dir="x")
    for name, (allowed, _) in REFUSED.items():
        assert run.train.get(name, vars(fresh)[name]) in allowed, name


# What is shown


def test_help_lists_objectives_and_verbs() -> None:
    text = invoke("--help").stdout
    assert "Direct Preference Optimization" in text
    for word in ["dpo", "train", "check", "show", "logps"]:
        assert f"\n  {word} " in text


def test_help_of_an_objective_shows_every_setting() -> None:
    text = " ".join(invoke("dpo", "--help").stdout.split())
    assert "--beta number > 0 Pull to the reference; larger keeps the policy nearer. [0.1]" in text
    assert "--model.dtype auto|float32|bfloat16|float16" in text
    assert "--train.learning_rate 1.0e-06" in text and "--launch" in text
    for rows in docs.sections(registry.find("dpo")).values():
        for row in rows:
            assert row.flag in text and row.description.split()[0] in text


@pytest.mark.parametrize(("words", "limit"), [(["--help"], 0.5), (["dpo", "--help"], 2.0)])
def test_help_is_quick(words: list[str], limit: float) -> None:
    """In processor time, which other programs on the machine do not stretch."""
    script = "import atexit, sys, time; from posttrain.cli import main; "
    script += "atexit.register(lambda: print(time.process_time(), file=sys.stderr)); main(sys.argv[1:])"
    best = 9.0
    for _ in range(3):
        got = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
        best = min(best, float(got.stderr.split()[-1]))
    assert best < limit


def test_show() -> None:
    listed = [line.split() for line in invoke("show").stdout.splitlines()[1:]]
    assert [words[0] for words in listed] == list(registry.names()) and ["dpo", "Direct", "Preference"] in [
        w[:3] for w in listed
    ]
    text = invoke("show", "dpo").stdout
    assert "arXiv:2305.18290, eq. 7" in text and "--beta  number > 0  [0.1]" in text and "local.yaml" in text
    text = invoke("show", "train").stdout
    assert "train.learning_rate = 1.0e-06" in text and "train.weight_decay = 0.0" in text
    assert "nothing to show for 'dpoo'; did you mean dpo?" in refused("show", "dpoo")


def test_check_shows_the_plan_and_reads_no_weights(model: Path, rows: Path, tmp_path: Path) -> None:
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]:
        if (model / name).exists():
            (tmp_path / name).write_text((model / name).read_text())
    result = invoke("check", "--objective", "dpo", "--model", tmp_path, "--data", rows, "--train.max_steps", 5)
    assert result.exit_code == 0, result.output
    text = result.stdout
    for part in ["12 rows, 12 kept, 0 dropped", "tokens (p50/p95/max)", "<|im_start|>user\n", "yes 0<|im_end|>", "5 of 8 rows"]:
        assert part in text, text
    assert f"frozen model {tmp_path}" in text and "optimizer" in text and " on each device: " in text and " weights " in text


def test_check_refuses_like_training(model: Path, rows: Path) -> None:
    assert "none of 12 rows" in refused("check", "--objective", "dpo", "--model", model, "--data", rows, "--data.max_length", 3)


# What a run leaves


def test_a_run_leaves_what_it_says(small: list[object], tmp_path: Path, model: Path, rows: Path) -> None:
    out = tmp_path / "out"
    result = invoke(*small, "--data.eval_size", 4, "--divergence", "js", "--train.save_steps", 2)
    assert result.exit_code == 0, result.output
    shown = result.stdout
    assert "dpo: beta 0.1, divergence js" in shown and f"frozen model {model}" in shown and "2 rows x 1 accumulated" in shown
    assert "step 1/4  loss 0.6931  margin 0.0000  accuracy 0.500  kl" in shown and "step 4/4" in shown
    assert "predicted on each device" in shown and f'from_pretrained("{out}")' in shown
    logs = read_metrics(out)
    assert [line["step"] for line in logs if "loss" in line] == [1, 2, 3, 4]
    assert logs[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    stored = json.loads((out / "run.json").read_text())
    assert stored["objective"] == {"name": "dpo", "beta": 0.1, "divergence": "js", "label_smoothing": 0.0}
    assert (
        stored["train"]["bf16"] is False and (out / "checkpoint-4" / "run.json").read_text() == (out / "run.json").read_text()
    )
    card = (out / "README.md").read_text()
    assert "None" not in card and "-log sigmoid" not in card.split("## Settings")[1]
    assert "| objective.divergence | js |" in card and "12 rows, 12 kept" in card and "| eval_rewards/accuracies |" in card
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["posttrain", "dpo"]

    again = ["--train.resume_from_checkpoint"]
    line = refused(*small, "--data.eval_size", 4, "--divergence", "js", *again, "false")
    assert "holds checkpoints of this run (the last is checkpoint-4) and train.resume_from_checkpoint is false" in line
    line = refused(*small, "--data.eval_size", 4, "--divergence", "js", "--train.save_steps", 2, "--train.learning_rate", 1)
    assert "train.learning_rate is 1e-06 there and 1.0 here; train.resume_from_checkpoint=true continues it" in line
    line = refused(*small, "--data.eval_size", 4, "--divergence", "js", "--beta", "0.2")
    assert "holds another run's checkpoints or model: objective.beta is 0.1 there and 0.2 here" in line
    again.append(str(out / "checkpoint-2"))
    line = refused(*small, "--data.eval_size", 4, *again)
    assert "is a checkpoint of another run: objective.divergence is 'js' there and 'reverse_kl' here" in line

    whole = [line | {"tokens_per_second": 0, "memory_gib": 0} for line in logs if "loss" in line]
    result = invoke(*small, "--data.eval_size", 4, "--divergence", "js", *again)
    assert result.exit_code == 0, result.output
    logs = read_metrics(out)
    assert [line | {"tokens_per_second": 0, "memory_gib": 0} for line in logs if "loss" in line] == whole
    assert sum("train_runtime" in line for line in logs) == 1


def test_logps_fill_the_cache_that_a_run_reads(small: list[object], tmp_path: Path) -> None:
    cache = ["--reference.cache", tmp_path / "cache"]
    result = invoke("logps", "--objective", "dpo", *small[1:], *cache)
    assert result.exit_code == 0 and "completions  24" in result.stdout, result.output
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert files
    result = invoke(*small, *cache, "--reference", "cached", "--beta", 0.5, "--train.seed", 3)
    assert result.exit_code == 0, result.output
    assert "cached log-probs of" in result.stdout and "step 1/4  loss 0.6931" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")} == files


@pytest.mark.parametrize("merge", [False, True])
def test_an_adapter_is_exported_alone_or_merged(small: list[object], tmp_path: Path, merge: bool) -> None:
    result = invoke(*small, "--model.peft.r", 2, "--model.merge", merge)
    assert result.exit_code == 0, result.output
    assert "the policy with its adapter off" in result.stdout
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert ("model.safetensors" in names) is merge and ("adapter_model.safetensors" in names) is not merge
    assert ("AutoPeftModelForCausalLM" in (tmp_path / "out" / "README.md").read_text()) is not merge


def test_the_hub_gets_our_card(small: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = {}

    def start(trainer: transformers.Trainer, token: str | None = None) -> None:
        trainer.hub_model_id = "me/mine"

    def draft(trainer: transformers.Trainer, **_: object) -> None:
        (tmp_path / "out" / "README.md").write_text("a draft")

    def upload(api: HfApi, **got: object) -> None:
        sent.update(got, card=Path(str(got["folder_path"]), "README.md").read_text(), token=api.token)

    monkeypatch.setattr(transformers.Trainer, "init_hf_repo", start)
    monkeypatch.setattr(transformers.Trainer, "push_to_hub", draft)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    monkeypatch.setenv("HF_TOKEN", "")
    hub = ["--train.push_to_hub", "--train.hub_model_id", "me/mine", "--train.hub_token", "secret"]
    result = invoke(*small, *hub, "--train.save_steps", 2, "--train.hub_strategy", "end")
    assert result.exit_code == 0, result.output
    assert sent["repo_id"] == "me/mine" and sent["card"].startswith("---\n") and "# mine\n" in sent["card"]
    assert 'from_pretrained("me/mine")' in sent["card"] and sent["token"] == "secret"
    assert "secret" not in result.output + sent["card"]
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 5 and not [path.name for path in files if b"secret" in path.read_bytes()]


# How it is launched


@pytest.mark.parametrize("name", ["single", "ddp", "fsdp2", "zero2", "zero3"])
def test_launch_configurations_load(name: str) -> None:
    config = load_config_from_file(str(shipped.launch_config(name)))
    kinds = {"single": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert config.distributed_type.value == kinds[name] and config.num_processes == (1 if name == "single" else 8)
    assert config.deepspeed_config.get("zero_stage") == {"zero2": 2, "zero3": 3}.get(name)


def test_launch_is_accelerate_launch(small: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", calls.append)
    assert invoke(*small, "--launch", "ddp", "--processes", 2).exit_code == 0
    assert logging.getLogger("any").isEnabledFor(logging.ERROR)
    (told,) = calls
    assert told.config_file == str(shipped.launch_config("ddp")) and told.num_processes == 2
    assert told.main_process_port == 0 and told.module and told.training_script == "posttrain"
    assert told.training_script_args == [str(word) for word in small]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert "one process per GPU and there is none here" in refused(*small, "--launch", "zero2")


@pytest.mark.multi
@pytest.mark.parametrize("name", ["single", "ddp"])
def test_a_mistake_in_launched_processes_is_one_line(small: list[object], tmp_path: Path, name: str) -> None:
    """Their line and their status; nothing of the launcher's."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"")
    command = [sys.executable, "-m", "posttrain", *small, "--launch", name, "--processes", 1 if name == "single" else 2]
    got = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    lines = [line for line in got.stderr.splitlines() if "error" in line.lower() or line.startswith(" ")]
    assert got.returncode == 2 and "Traceback" not in got.stderr, got.stderr
    assert len(lines) == 1 and "holds another run's checkpoints or model" in lines[0]


def test_an_adapter_starts_from_the_seed_alone(small: list[object]) -> None:
    """Whatever was drawn before: reading weights draws other numbers where ZeRO-3 cuts them."""
    settings = ModelConfig(name=str(small[2]), peft={"r": 2})
    starts = []
    for drawn, seed in ((0, 1), (5, 1), (5, 2)):
        torch.rand(drawn)
        parameters = load_policy(settings, seed).named_parameters()
        starts.append(torch.cat([p.flatten() for name, p in parameters if "lora_A" in name]))
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[1], starts[2])


@pytest.mark.multi
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize("adapter", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_launched_under_zero3_it_is_the_same_run(small: list[object], tmp_path: Path, adapter: bool) -> None:
    """Two processes of 2 rows are one of 4, and the exported model is whole, though ZeRO-3 cuts it into pieces."""
    small += ["--model.peft.r", 4] if adapter else []
    small += ["--train.learning_rate", "1e-2", "--train.warmup_steps", 0, "--train.optim", "adamw_torch"]
    small += ["--train.max_steps", 2]
    alone, apart = tmp_path / "alone", tmp_path / "apart"
    result = invoke(*small, "--train.per_device_train_batch_size", 4, "--train.output_dir", alone)
    assert result.exit_code == 0, result.output
    command = [sys.executable, "-m", "posttrain", *small, "--train.output_dir", apart, "--launch", "zero3", "--processes", 2]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    compile_communication(environment)
    got = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
    assert got.returncode == 0, got.stderr[-3000:]
    assert "x 2 processes = 4 rows a step" in got.stdout and got.stdout.count("posttrain dpo\n") == 1
    losses = [[line["loss"] for line in read_metrics(folder) if "loss" in line] for folder in (alone, apart)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and losses[0][1] < (0.69 if adapter else 0.68)
    name = "adapter_model.safetensors" if adapter else "model.safetensors"
    weights = [load_file(folder / name) for folder in (alone, apart)]
    assert weights[0].keys() == weights[1].keys()
    for key, values in weights[0].items():
        torch.testing.assert_close(values, weights[1][key], atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [(["dpo", "--bata", "1"], 2, "did you mean beta?"), (["show", "train"], 0, "train.learning_rate = 1.0e-06")],
)
def test_python_dash_m(words: list[str], status: int, says: str) -> None:
    """In a process of its own, where torch is not imported yet."""
    got = subprocess.run([sys.executable, "-m", "posttrain", *words], capture_output=True, text=True)
    assert got.returncode == status and says in got.stdout + got.stderr
    assert status == 0 or got.stderr.count("\n") == 1
