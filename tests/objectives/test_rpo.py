"""RPO's three reductions against the formulas of their sources and numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from golden import close, golden
from hand import at_the_ends, completions, slopes

from posttrain.objectives.preference.rpo import RPOConfig, rpo
from posttrain.registry import find
from posttrain.schema import UserError, parse
from posttrain.stats import Completions, Pairs


def spread(logps: list[float], reference_logps: list[float], lengths: list[float]) -> Completions:
    """Completions of these lengths whose sums are given; each token has an equal part."""
    rows = [[value / n] * int(n) for value, n in zip(logps, lengths, strict=True)]
    reference = [[value / n] * int(n) for value, n in zip(reference_logps, lengths, strict=True)]
    return completions(rows, reference)


@pytest.fixture
def paper() -> tuple[dict, dict, Pairs]:
    """Inputs, outputs and pairs of the golden file, which gives sums and lengths."""
    file = golden("baseline_rpo_slic")
    sides = {role: spread(*(file.inputs[f"{name}_{role}{end}"] for name, end in KEYS)) for role in ("chosen", "rejected")}
    return file.inputs, file.outputs, Pairs(**sides)


KEYS = (("policy", "_logps"), ("reference", "_logps"), ("response_lengths", ""))


def test_mean_is_iterative_rpo(paper: tuple[dict, dict, Pairs]) -> None:
    inputs, outputs, pairs = paper
    loss = rpo(RPOConfig(beta=inputs["beta"], nll="mean", eta=inputs["alpha_rpo"]), pairs)
    assert loss.plus is None
    close(loss.values, outputs["rpo_per_example"])


def test_tokens_is_trl(paper: tuple[dict, dict, Pairs]) -> None:
    inputs, outputs, pairs = paper
    loss = rpo(RPOConfig(beta=inputs["beta"], nll="tokens"), pairs)
    assert loss.plus is not None and loss.plus.per == "chosen"
    close(loss.values.mean() + loss.plus.values.mean(), outputs["rpo_token_mean_nll_total"])


def test_by_hand() -> None:
    """beta 0.5. Chosen -1, -3 under both models: NLL sum 4, mean 2. All log-ratios are 0, so the part of DPO is log 2."""
    pairs = Pairs(chosen=completions([[-1.0, -3.0]], [[-1.0, -3.0]]), rejected=completions([[-2.0]], [[-2.0]]))
    close(rpo(RPOConfig(beta=0.5, nll="sum", eta=0.1), pairs).values, [math.log(2) + 0.1 * 0.5 * 4])
    close(rpo(RPOConfig(beta=0.5, nll="mean", eta=0.1), pairs).values, [math.log(2) + 0.1 * 2])
    tokens = rpo(RPOConfig(beta=0.5, nll="tokens", eta=0.1), pairs)
    close(tokens.values, [math.log(2)])
    close(tokens.plus.values, [0.1, 0.3])
    for nll, weight in (("sum", 0.1 * 0.5), ("mean", 0.1 / 2), ("tokens", 0.0)):
        loss = rpo(RPOConfig(beta=0.5, nll=nll, eta=0.1), pairs)
        close(slopes(loss, pairs)[0], [-0.25 - weight] * 2)
        close(loss.metrics["nll/chosen"], [2.0])


@pytest.mark.parametrize(("nll", "eta"), [("sum", 0.005), ("mean", 0.2), ("tokens", 1.0)])
def test_eta_of_a_reduction_is_that_of_its_users(nll: str, eta: float) -> None:
    pairs = Pairs(chosen=completions([[-1.0, -3.0]]), rejected=completions([[-2.0]]))
    ours, given = rpo(RPOConfig(nll=nll), pairs), rpo(RPOConfig(nll=nll, eta=eta), pairs)
    close(ours.values, given.values.tolist(), 0)
    assert (ours.plus is None) is (given.plus is None)


def test_start_is_known_without_the_nll() -> None:
    assert find("rpo").start(RPOConfig()) is None
    assert find("rpo").start(RPOConfig(eta=0)) == math.log(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ends(dtype: torch.dtype) -> None:
    """The NLL goes on pulling where the pair is in order."""
    _, _, (chosen, _) = at_the_ends(find("rpo"), RPOConfig(), dtype=dtype)
    assert (chosen < 0).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nll": "rows"}, "rpo: nll = 'rows': Input should be 'sum', 'mean' or 'tokens'"),
        ({"eta": -1}, "rpo: eta = -1: Input should be greater than or equal to 0"),
    ],
)
def test_refused_settings(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(RPOConfig, values, "rpo")
    assert str(error.value) == message
