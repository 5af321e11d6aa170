"""`posttrain eval`: what it measures of a tiny model, against sums over all completions; and what it refuses."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tiny import tiny_tokenizer
from tiny_models import saved
from transformers import AutoModelForCausalLM

from posttrain.cli import main
from posttrain.evaluate import evaluate, load_eval_run
from posttrain.schema import UserError

PROMPTS = ["ab", "no", "yes ab", "b"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A policy and the reference it is to be compared with, two random models of one vocabulary."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), tiny_tokenizer(chat=False)
    return {
        name: saved(folder / name, tokenizer, seed=seed, initializer_range=0.3)
        for seed, name in enumerate(("policy", "reference"))
    }


@pytest.fixture
def words(models: dict[str, Path], write: Callable[..., str], tmp_path: Path) -> list[str]:
    data = write(*({"prompt": text, "answer": n} for n, text in enumerate(PROMPTS)))
    settings = {"model": models["policy"], "reference": models["reference"], "data": data, "output": tmp_path / "out"}
    settings |= {"n": 64, "max_new_tokens": 2, "stop_at_eos": False, "batch_size": 64, "engine.batch_size": 64}
    settings |= {"reward": "length", "reward.unit": "characters", "reward.heldout": "length"}
    return [f"{name}={value}" for name, value in settings.items()]


def exact_kl(models: dict[str, Path], prompt: list[int]) -> float:
    """KL of the two models' completions of two tokens, over all pairs of tokens."""
    sides = []
    with torch.no_grad():
        for folder in models.values():
            model = AutoModelForCausalLM.from_pretrained(folder)
            first = model(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)  # [V]
            all_first = torch.tensor([[*prompt, token] for token in range(len(first))])
            second = model(all_first).logits[:, -1].double().log_softmax(-1)  # [V, V]
            sides.append(first[:, None] + second)
    return (sides[0].exp() * (sides[0] - sides[1])).sum().item()


def test_measures_what_sums_over_all_completions_say(words: list[str], models: dict[str, Path]) -> None:
    told = evaluate(load_eval_run(overrides=words))
    metrics, errors = told["metrics"], told["errors"]
    tokenizer = tiny_tokenizer(chat=False)
    exact = sum(exact_kl(models, tokenizer(text)["input_ids"]) for text in PROMPTS) / len(PROMPTS)
    lines = [json.loads(line) for line in Path(words[3].split("=")[1], "policy.jsonl").read_text().splitlines()]
    assert told["prompts"] == 4 and told["completions"] == 256
    assert metrics["length"] == 2 and metrics["kl/analytic"] > 0
    within = 5 * 0.4 / math.sqrt(256) + 0.05 * exact
    assert metrics["kl/analytic"] == pytest.approx(exact, abs=within)
    assert metrics["kl/sampled"] == pytest.approx(exact, abs=5 * 2.5 / math.sqrt(256))
    texts = [text for line in lines for text in line["completions"]]
    assert metrics["reward"] == pytest.approx(sum(map(len, texts)) / 256)
    assert metrics["reward/heldout"] == pytest.approx(sum(len(text.split()) for text in texts) / 256)
    grams = [tuple(text.split()[at : at + 1]) for text in texts for at in range(len(text.split()))]
    assert metrics["distinct_1"] == pytest.approx(len(set(grams)) / len(grams))
    means = [sum(map(len, line["completions"])) / 64 for line in lines]
    deviation = math.sqrt(sum((one - metrics["reward"]) ** 2 for one in means) / 3)
    assert errors["reward"] == pytest.approx(deviation / 2)
    others = [json.loads(line) for line in Path(words[3].split("=")[1], "reference.jsonl").read_text().splitlines()]
    won = [
        (len(a) > len(b)) + (len(a) == len(b)) / 2
        for line, other in zip(lines, others, strict=True)
        for a, b in itertools.product(line["completions"], other["completions"])
    ]
    assert metrics["win_rate"] == pytest.approx(sum(won) / len(won))


def test_a_model_beside_itself_and_alone(words: list[str], models: dict[str, Path], tmp_path: Path) -> None:
    """No distance, and as many wins as losses; entropy lies below that of a uniform distribution. Again: the same numbers."""
    words = [*words, f"reference={models['policy']}", "n=2", f"output={tmp_path / 'itself'}"]
    metrics = evaluate(load_eval_run(overrides=words))["metrics"]
    assert metrics["kl/sampled"] == pytest.approx(0, abs=1e-6) and metrics["kl/analytic"] == pytest.approx(0, abs=1e-6)
    assert metrics["win_rate"] == 0.5
    assert 0 < metrics["entropy"] < math.log(len(tiny_tokenizer(chat=False)))
    assert evaluate(load_eval_run(overrides=words))["metrics"] == metrics
    alone = [word for word in words if not word.startswith("reference")]
    told = evaluate(load_eval_run(overrides=[*alone, f"output={tmp_path / 'alone'}"]))
    assert told["reference"] is None and not {"kl/sampled", "kl/analytic", "win_rate"} & told["metrics"].keys()
    assert told["metrics"]["entropy"] == metrics["entropy"]


def test_completions_that_a_stop_string_left_without_tokens(words: list[str], models: dict[str, Path], tmp_path: Path) -> None:
    """They count as completions, and what is said of their tokens is 0."""
    strings = json.dumps([chr(number) for number in range(32, 127)])
    more = ["n=8", f"stop={strings}", "stop_at_eos=true", f"output={tmp_path / 'stopped'}"]
    metrics = evaluate(load_eval_run(overrides=[*words, *more]))["metrics"]
    lines = [json.loads(line) for line in (tmp_path / "stopped" / "policy.jsonl").read_text().splitlines()]
    sizes = [len(ids) for line in lines for ids in line["completion_ids"]]
    assert sizes.count(0) > 3 and metrics["length"] == pytest.approx(sum(sizes) / 32) and 0 < metrics["length"] < 2
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder) for folder in models.values())
    rows = [(line["prompt_ids"], ids) for line in lines for ids in line["completion_ids"]]
    assert metrics["kl/sampled"] == pytest.approx(
        sum(logp(policy, *row) - logp(reference, *row) for row in rows) / 32, abs=1e-4
    )


def logp(model: Any, prompt: list[int], completion: list[int]) -> float:
    """Of the whole completion."""
    with torch.no_grad():
        logps = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    return sum(logps[len(prompt) + at - 1, token].item() for at, token in enumerate(completion))


def seen(prompts: list[Any], completions: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """A scorer that reads the row of its prompt."""
    return [float(row["answer"] == PROMPTS.index(prompt)) for prompt, row in zip(prompts, rows, strict=True)]


def test_scorers_see_prompts_and_rows(words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    kept = [word for word in words if not word.startswith(("reward", "reference"))]
    told = evaluate(load_eval_run(overrides=[*kept, "n=1", "reward=test_evaluate:seen", f"output={tmp_path / 'seen'}"]))
    assert told["metrics"]["reward"] == 1 and told["errors"]["reward"] == 0


def test_prompts_of_token_ids(words: list[str], write: Callable[..., str], tmp_path: Path) -> None:
    """They are scored as the text that they stand for."""
    data = write({"prompt": [1, 5, 6]}, {"prompt": [1, 7]}, name="ids.jsonl")
    kept = [word for word in words if not word.startswith(("data", "reference"))]
    told = evaluate(load_eval_run(overrides=[*kept, f"data={data}", "n=1", f"output={tmp_path / 'ids'}"]))
    assert told["prompts"] == 2 and told["metrics"]["length"] == 2


def test_refuses(words: list[str]) -> None:
    for change, message in (
        (["temperature=0.5"], "the KL is that of the model's own distribution"),
        (["top_p=0.9"], "the KL is that of the model's own distribution"),
        (["rewrd=length"], "unknown setting 'rewrd'; did you mean reward?"),
        (["data.streaming=true"], "eval: data.streaming cannot go on where a file ends; leave it out"),
    ):
        with pytest.raises(UserError) as error:
            load_eval_run(overrides=[*words, *change])
        assert message in str(error.value)
    with pytest.raises(UserError, match="eval: reward is required"):
        load_eval_run(overrides=[word for word in words if not word.startswith("reward")])


def test_help_lists_every_setting() -> None:
    text = " ".join(CliRunner().invoke(main, ["eval", "--help"]).output.split())
    assert all(flag in text for flag in ("--reference", "--similarity", "--reward", "--max_new_tokens", "--engine.url", "--n "))
