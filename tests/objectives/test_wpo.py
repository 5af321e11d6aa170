"""WPO against the authors' code, TRL and numbers worked by hand, on every loss it takes."""

from __future__ import annotations

import dataclasses
from math import exp, log1p

import pytest
import torch
from golden import close, golden
from hand import completions
from random_statistics import leaves, random_statistics, terms

from posttrain.objectives.preference.wpo import LOSS, WPOConfig, wpo
from posttrain.recipe import load_run
from posttrain.reference import reads_vocabulary
from posttrain.references import kind_of
from posttrain.registry import find
from posttrain.schema import UserError, parse
from posttrain.stats import Completions, Pairs

WPO = find("wpo")


@pytest.mark.parametrize(
    ("file", "clamp"),
    [
        ("wpo_official_sampled", True),
        ("wpo_official_sampled_smoothing", True),
        ("wpo_official_clamp_active", True),
        ("wpo_trl_sampled", False),
    ],
)
def test_released_code(file: str, clamp: bool) -> None:
    official = golden(file)
    inner = {"beta": official.inputs["beta"], "label_smoothing": official.inputs.get("label_smoothing", 0.0)}
    metrics = official.agree(WPO, WPOConfig(loss={"name": "dpo", **inner}, clamp=clamp)).metrics
    outputs = official.outputs
    if "pair_weights" in outputs:
        close(metrics["wpo/weight"], outputs["pair_weights"])
    for role in ("chosen", "rejected"):
        if f"log_weight_{role}" in outputs:
            close(metrics[f"wpo/log_weight/{role}"], outputs[f"log_weight_{role}"])
            close(metrics[f"rewards/{role}"], outputs[f"{role}_rewards"])
        if f"weights_{role}" in outputs:
            close(metrics[f"wpo/log_weight/{role}"].exp(), outputs[f"weights_{role}"])


def test_the_paper_does_not_clamp() -> None:
    official = golden("wpo_official_clamp_active")
    metrics = WPO(WPOConfig(loss={"name": "dpo", "beta": 0.1}), official.pairs(["log_sum_p2"])).metrics
    close(metrics["wpo/weight"], official.outputs["unclamped_pair_weights"])
    close(metrics["wpo/above_one"], [1, 1, 1, 0])


def pair() -> Pairs:
    """Log-probs -1 and -3 beside -2, the reference's 0; log sum p^2 -0.5, -0.7 | -1.4; log max p -0.2, 0 | -2."""

    def one(logps: list[float], **more: list[float]) -> Completions:
        return dataclasses.replace(
            completions([logps]), more={name: torch.tensor(values, dtype=torch.float64) for name, values in more.items()}
        )

    return Pairs(
        chosen=one([-1.0, -3.0], log_sum_p2=[-0.5, -0.7], max_logp=[-0.2, 0.0]),
        rejected=one([-2.0], log_sum_p2=[-1.4], max_logp=[-2.0]),
    )


@pytest.mark.parametrize(
    ("settings", "chosen", "rejected", "log_w"),
    [
        ({}, -1.4, -0.6, -2.0),  # -2 + 0.6 and -2 + 1.4
        ({"side": "chosen"}, -1.4, -0.6, -1.4),
        ({"side": "rejected"}, -1.4, -0.6, -0.6),
        ({"alignment": "greedy"}, -1.9, 0.0, -1.9),  # -2 + 0.1 and -2 + 2
        ({"alignment": "none"}, -2.0, -2.0, -4.0),
    ],
)
def test_by_hand(settings: dict[str, str], chosen: float, rejected: float, log_w: float) -> None:
    """DPO of beta 1/2 on log-ratios -4 and -2: margin -1, loss log(1 + e), slope 1/2 sigmoid(1) for every token."""
    batch = pair()
    loss = wpo(WPOConfig(loss={"beta": 0.5}, **settings), batch)
    close(loss.values, [exp(log_w) * log1p(exp(1))])
    for role, expected, sign in (("chosen", chosen, -1), ("rejected", rejected, 1)):
        close(loss.metrics[f"wpo/log_weight/{role}"], [expected])
        logps = vars(batch)[role].logps
        (slope,) = torch.autograd.grad(loss.values.sum(), logps, retain_graph=True)
        close(slope, [sign * exp(log_w) * 0.5 / (1 + exp(-1))] * len(logps))
    names = {name.rpartition("/")[2] for name in loss.metrics}
    assert ("log_sum_p2" in names) is (settings.get("alignment", "sampled") == "sampled")
    assert ("max_logp" in names) is (settings.get("alignment") == "greedy")


def test_the_clamp_is_on_the_product() -> None:
    """log w(chosen) = 2 and log w(rejected) = -1: each alone clamped, w would be e^-1."""
    batch = Pairs(
        chosen=dataclasses.replace(completions([[-1.0]]), more={"max_logp": torch.tensor([-3.0])}),
        rejected=dataclasses.replace(completions([[-2.0]]), more={"max_logp": torch.tensor([-1.0])}),
    )
    for clamp, w in ((True, 1.0), (False, exp(1))):
        metrics = wpo(WPOConfig(alignment="greedy", clamp=clamp), batch).metrics
        close(metrics["wpo/weight"], [w])
        close(metrics["wpo/above_one"], [1])


def weighted(statistics: Pairs, log_weights: dict[str, torch.Tensor]) -> Pairs:
    """The statistics with a log sum p^2 that makes these log-weights [B]."""

    def changed(role: str) -> Completions:
        one = vars(statistics)[role]
        return dataclasses.replace(one, more={**one.more, "log_sum_p2": one.logps.detach() - one.spread(log_weights[role])})

    return dataclasses.replace(statistics, **{role: changed(role) for role in log_weights})


@pytest.mark.parametrize("name", LOSS.possible())
def test_every_loss_it_takes_is_weighted(name: str) -> None:
    """Values and gradients of all terms are those of the loss alone times w, so with w = 1 they are the same."""
    inner = find(name)
    statistics = random_statistics(Pairs, want=inner.want(inner.config()), rows=3)
    log_w = torch.tensor([0.0, 0.7, -1.2], dtype=torch.float64)
    batch = weighted(statistics, {"chosen": 3 * log_w, "rejected": -2 * log_w})
    own = {"beta": 0.1} if name == "dpo" else {}
    ours, theirs = wpo(WPOConfig(loss={"name": name, **own}), batch), inner(inner.config(), statistics)
    assert ours.metrics.keys() > theirs.metrics.keys() and ours.remember.keys() == theirs.remember.keys()
    assert len(terms(ours)) == len(terms(theirs))
    for got, one in zip(terms(ours), terms(theirs), strict=True):
        weight = log_w.exp() if one.per == "row" else vars(statistics)[one.per].spread(log_w.exp())
        assert got.per == one.per
        torch.testing.assert_close(got.values, one.values * weight, rtol=1e-12, atol=1e-12)
        expected = torch.autograd.grad((one.values * weight).sum(), leaves(statistics), retain_graph=True, allow_unused=True)
        slopes = torch.autograd.grad(got.values.sum(), leaves(statistics), retain_graph=True, allow_unused=True)
        for slope, reference in zip(slopes, expected, strict=True):
            assert (slope is None) is (reference is None)
            if slope is not None:
                torch.testing.assert_close(slope, reference, rtol=1e-12, atol=1e-12)


def test_flat_rows_in_low_precision() -> None:
    """152 thousand equal tokens: p^2 is 4e-11, whose logarithm bfloat16 and float32 know; w = 1."""
    flat = -torch.log(torch.tensor(152_000.0))
    for dtype in (torch.float32, torch.bfloat16):
        one = lambda d=dtype: dataclasses.replace(completions([[float(flat)]], dtype=d), more={"log_sum_p2": flat[None].to(d)})  # noqa: E731
        loss = wpo(WPOConfig(), Pairs(chosen=one(), rejected=one()))
        assert loss.values.dtype == torch.float32
        close(loss.metrics["wpo/weight"], [1.0])


def run(*overrides: str):
    return load_run("wpo", overrides=["model=policy", "data=pairs.jsonl", *overrides])


def test_what_is_read_and_wanted_follows_the_loss() -> None:
    for settings, reads, want in (
        ([], True, ["log_sum_p2"]),
        (["loss.name=simpo", "alignment=none"], False, []),
        (["loss.name=hdpo", "alignment=greedy"], True, ["entropy", "max_logp"]),
    ):
        got = run(*settings)
        assert WPO.reads_reference(got.config) is reads and list(WPO.want(got.config)) == want
        assert kind_of(got) == ("frozen" if reads else "none")
        assert not reads_vocabulary(WPO, got.config)
    with pytest.raises(UserError, match=r"^reference: wpo reads no reference; leave the section out$"):
        run("loss.name=simpo", "reference=cached")


@pytest.mark.parametrize("name", ["tdpo", "aot", "mmpo", "sppo_soft", "kto", "wpo", "wpo_kto"])
def test_other_losses_are_refused(name: str) -> None:
    with pytest.raises(UserError) as error:
        run(f"loss.name={name}")
    assert str(error.value).startswith(f"objective.loss: name = '{name}' is not a loss of the log-probs of one pair")
    assert str(error.value).endswith(f" Possible: {', '.join(LOSS.possible())}")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alignment": "best"}, "objective: alignment = 'best': Input should be 'sampled', 'greedy' or 'none'"),
        ({"side": "left"}, "objective: side = 'left': Input should be 'both', 'chosen' or 'rejected'"),
        ({"clamp": "maybe"}, "objective: clamp = 'maybe': Input should be a valid boolean, unable to interpret input"),
    ],
)
def test_refused_settings(values: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(WPOConfig, values, "objective")
    assert str(error.value) == message
