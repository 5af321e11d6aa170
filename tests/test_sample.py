"""`posttrain sample`: what it writes, how it goes on, what it refuses; and the engine that reads files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import saved
from transformers import GenerationConfig

from posttrain.cli import main
from posttrain.engines.build import build, ends_of
from posttrain.engines.file import FileEngine
from posttrain.engines.rollout import Rollout, text_of
from posttrain.sample import load_sample_run, sample
from posttrain.schema import UserError
from posttrain.settings import EngineConfig, ModelConfig, SamplingConfig

TEXTS = ["how are you", "tell me a story", "what is it", "a", "no", "yes", "why not"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with its tokenizer."""
    return str(saved(tmp_path_factory.mktemp("model"), bos_token_id=1, eos_token_id=2))


@pytest.fixture
def words(folder: str, write: Callable[..., str], tmp_path: Path) -> list[str]:
    """A command on seven prompts, of which hf samples two at a time."""
    data = write(*({"prompt": text} for text in TEXTS))
    output = tmp_path / "out" / "samples.jsonl"
    return [f"model={folder}", f"data={data}", f"output={output}", "n=2", "max_new_tokens=6", "engine.batch_size=4"]


def run(words: list[str], *more: str) -> Path:
    settings = load_sample_run(None, [*words, *more])
    assert sample(settings) == len(TEXTS)
    return Path(settings.output)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_is_a_prompt_with_its_completions(words: list[str], tokenizer: Any) -> None:
    written = lines(run(words))
    assert [line["row"] for line in written] == list(range(7))
    assert [line["asked"] for line in written] == [[{"role": "user", "content": text}] for text in TEXTS]
    assert written[1]["prompt"] == tokenizer.apply_chat_template(
        [{"role": "user", "content": TEXTS[1]}], add_generation_prompt=True, tokenize=False
    )
    for line in written:
        assert line["prompt_ids"] == tokenizer(line["prompt"], add_special_tokens=False)["input_ids"]
        assert len(line["completions"]) == len(line["completion_ids"]) == len(line["finished"]) == 2
        assert [len(ids) for ids in line["completion_ids"]] == [len(logps) for logps in line["logps"]]
        assert all(len(ids) <= 6 for ids in line["completion_ids"])
        assert all(logp < 0 for logps in line["logps"] for logp in logps)
    assert len({tuple(ids) for line in written for ids in line["completion_ids"]}) > 10


@pytest.mark.parametrize("kept", [0, 1, 3, 6])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(words: list[str], kept: int) -> None:
    """Cut within a line, anywhere in a group that is sampled together."""
    path = run(words)
    whole = path.read_bytes()
    upto = len(b"".join(whole.splitlines(keepends=True)[:kept]))
    path.write_bytes(whole[: upto + 40])
    run(words)
    assert path.read_bytes() == whole
    run(words)
    assert path.read_bytes() == whole


def test_another_seed_is_another_file(words: list[str], tmp_path: Path) -> None:
    first = lines(run(words))
    other = lines(run(words, "seed=1", f"output={tmp_path / 'other.jsonl'}"))
    assert [line["prompt_ids"] for line in first] == [line["prompt_ids"] for line in other]
    assert [line["completion_ids"] for line in first] != [line["completion_ids"] for line in other]


def test_files_of_other_runs_are_left_alone(words: list[str], write: Callable[..., str]) -> None:
    path = run(words)
    before = path.read_bytes()
    for more, message in (
        ("temperature=0.5", r"sampling.temperature is 1.0 there and 0.5 here"),
        ("n=3", "n is 2 there and 3 here"),
        ("data.max_length=9", "data.max_length is 1024 there and 9 here"),
    ):
        with pytest.raises(UserError, match=f"another run's: {message}; choose another file"):
            run(words, more)
    run(words, "engine.batch_size=2")
    write(*({"prompt": text} for text in reversed(TEXTS)))
    with pytest.raises(UserError, match="holds prompts that the data no longer has there"):
        run(words)
    path.write_bytes(before.replace(b'{"row": 2,', b'{"row": 5,'))
    with pytest.raises(UserError, match="line 3 is damaged"):
        run(words)
    Path(f"{path}.json").unlink()
    with pytest.raises(UserError, match="posttrain sample did not write it"):
        run(words)


def test_a_file_from_before_a_setting_was_there_goes_on(words: list[str]) -> None:
    path = run(words)
    whole, beside = path.read_bytes(), Path(f"{path}.json")
    settings = json.loads(beside.read_text())
    assert settings["sampling"].pop("stop") is None
    beside.write_text(json.dumps(settings))
    path.write_bytes(whole.splitlines(keepends=True)[0])
    run(words)
    assert path.read_bytes() == whole
    with pytest.raises(UserError, match=r"another run's: sampling\.stop is None there and \['a'\] here"):
        run(words, "stop=a")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("temprature=1", "unknown setting 'temprature'; did you mean temperature\\?"),
        ("max_length=9", "unknown setting 'max_length'; did you mean data.max_length\\?"),
        ("engine=vlm", "engine: kind = 'vlm'"),
        ("engine.url=http://here", "engine.url is for vllm server and would be ignored by hf"),
        ("engine=file", "engine.path is required"),
        ("n=0", "sample: n = 0"),
        ("model.peft={r: 8}", "model.peft makes a new adapter"),
        ("data.eval_size=2", "hold out rows"),
        ("data.streaming=true", "data.streaming cannot go on"),
    ],
)
def test_mistakes_are_one_line(words: list[str], more: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=message):
        load_sample_run(None, [*words, more])
    with pytest.raises(SystemExit) as end:
        main(["sample", *words, more])
    assert end.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_truncation_is_said(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run(words, "top_k=3")
    assert "top_k = 3 samples from a truncated" in capsys.readouterr().out


def test_a_file_gives_back_what_was_sampled(words: list[str], tmp_path: Path) -> None:
    path = run(words)
    words.remove("engine.batch_size=4")
    again = run(words, "engine=file", f"engine.path={path}", f"output={tmp_path / 'again.jsonl'}")
    assert lines(again) == lines(path)


def test_a_file_of_text_is_tokenised_as_training_data_is(
    write: Callable[..., str], tokenizer: Any, plain_tokenizer: Any
) -> None:
    path = write({"prompt": "say it", "completions": ["ab yes", "no"]}, {"prompt": "and", "completions": ["b"]})
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "say it"}], add_generation_prompt=True)["input_ids"]
    first, second = FileEngine(path, tokenizer).generate([chat], 2)
    assert first == Rollout(chat, [*tokenizer("ab yes", add_special_tokens=False)["input_ids"], 4], None, True, 0, 0)
    assert text_of(second, tokenizer) == "no"
    plain = plain_tokenizer("say it")["input_ids"]
    one = FileEngine(path, plain_tokenizer).generate([plain])[0]
    assert one.completion[-1] == plain_tokenizer.eos_token_id
    with pytest.raises(UserError, match="2 completions of prompt 1 of 1, 3 are asked for; it holds 2 prompts"):
        FileEngine(path, tokenizer).generate([chat], 3)
    with pytest.raises(UserError, match="0 completions of prompt 2 of 2"):
        FileEngine(path, tokenizer).generate([chat, [1, 2]])


def test_a_file_of_ids(write: Callable[..., str], tokenizer: Any) -> None:
    first = {"prompt_ids": [1, 2], "completion_ids": [[3], [4, 5]], "logps": [[-1.0], [-2.0, -0.5]], "finished": [True, False]}
    path = write({**first, "version": 7}, {"prompt_ids": [1, 2], "completion_ids": [[9]]})
    assert FileEngine(path, tokenizer).generate([[1, 2]], 3) == [
        Rollout([1, 2], [3], [-1.0], True, 0, 7),
        Rollout([1, 2], [4, 5], [-2.0, -0.5], False, 0, 7),
        Rollout([1, 2], [9], None, True, 0, 0),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 2 is not JSON"),
        ('{"prompt": "a"}', "line 2 has prompt; expected prompt_ids and completion_ids"),
        ("[1]", "line 2 has a list"),
        ('{"prompt_ids": [], "completion_ids": [[1]]}', "line 2: prompt_ids has to be a list of token ids"),
        ('{"prompt_ids": [1], "completion_ids": []}', "line 2: prompt_ids has to be a list of token ids"),
        ('{"prompt_ids": ["a"], "completion_ids": [[1]]}', "line 2: prompt_ids has to be"),
        ('{"prompt_ids": [1], "completion_ids": [[1]], "finished": [true, true]}', "line 2: finished has 2 entries for 1"),
        ('{"prompt_ids": [1], "completion_ids": [[1]], "logps": [[-1, -2]]}', "line 2: 2 logps for a completion of 1 token"),
        ('{"prompt": "a", "completions": []}', "line 2: completions has to be a list of texts"),
        ('{"completions": ["a"]}', "line 2 has completions and no prompt"),
        ('{"prompt": "a", "completions": [" "]}', "line 2: empty completion"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path: Path, tokenizer: Any, text: str, message: str) -> None:
    path = tmp_path / "file.jsonl"
    path.write_text('{"prompt_ids": [1], "completion_ids": [[2]]}\n' + text)
    with pytest.raises(UserError, match=message):
        FileEngine(path, tokenizer)
    with pytest.raises(UserError, match="no such file"):
        FileEngine(tmp_path / "none.jsonl", tokenizer)


def test_completions_end_with_the_tokens_that_the_model_names(folder: str, tmp_path: Path, tokenizer: Any) -> None:
    assert ends_of(ModelConfig(name=folder), tokenizer) == [4, 2]
    GenerationConfig(eos_token_id=[3, 4]).save_pretrained(tmp_path)
    assert ends_of(ModelConfig(name=str(tmp_path)), tokenizer) == [4, 3]
    assert ends_of(ModelConfig(name=str(tmp_path / "none")), tokenizer) == [4]


def test_an_engine_that_is_not_installed_or_not_there(folder: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def engine(**settings: Any) -> Any:
        return build(EngineConfig(**settings), SamplingConfig(), ModelConfig(name=folder), tokenizer, model=lambda: None)

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"vllm is not installed; pip install 'posttrain\[vllm\]', or give engine.url"):
        engine(kind="vllm")
    with pytest.raises(UserError, match="expected http://host:port"):
        engine(kind="vllm", url="localhost:8000")
    with pytest.raises(
        UserError, match=r"GET http://127.0.0.1:9/v1/models: no answer .* start it: VLLM_SERVER_DEV_MODE=1 vllm"
    ):
        engine(kind="vllm", url="http://127.0.0.1:9", retries=1)
