"""Ra-DPO against the authors' code, the paper's formulas and numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from golden import close, golden

from posttrain.objectives.preference.radpo import RaDPOConfig, radpo
from posttrain.recipe import load_run
from posttrain.references import kind_of
from posttrain.registry import find
from posttrain.schema import UserError, parse
from posttrain.stats import Completions, Pairs

RADPO, TDPO = find("radpo"), find("tdpo")


@pytest.mark.parametrize(
    "name",
    [
        "radpo1_official_nosplit_cl0.6",
        "radpo1_official_split_cl0.6",
        "radpo1_official_split_cl0.95",
        "radpo2_official_nosplit_cl0.95",
    ],
)
def test_authors_code(name: str) -> None:
    official = golden(name)
    config = RaDPOConfig(
        beta=official.inputs["beta"],
        alpha=official.inputs["alpha"],
        version=2 if official.inputs["if_ra_dpo2"] else 1,
        risk="official",
        mu=official.inputs["confidence_level"],
        split=official.inputs["is_split_risk_ratio"],
    )
    loss = official.agree(RADPO, config)
    for role in ("chosen", "rejected"):
        close(loss.metrics[f"risk/{role}"], official.outputs[f"seq_risk_{role}"])
        if config.version == 1:
            close(loss.metrics[f"rewards/{role}"], official.outputs[f"{role}_rewards"])


def test_exact_lower_cvar() -> None:
    paper = golden("radpo2_exact_cvar_lower_0.97")
    values = {name: paper.inputs[name] for name in ("beta", "alpha", "mu", "risk")}
    paper.agree(RADPO, RaDPOConfig(version=2, **values))


def test_every_measure_of_the_paper() -> None:
    """The file's erm_readme_5 is erm_lower with the other sign, which no setting gives."""
    paper = golden("radpo_paper_risk_measures")
    measures = [name for name in paper.outputs if name not in ("erm_readme_5", "kl_ref_pi")]
    settings = {name: {"risk": name.rpartition("_")[0], "mu": float(name.rpartition("_")[2])} for name in measures}
    for name, values in {**settings, "kl_ref_pi": {"risk": "kl"}}.items():
        expected = paper.outputs[name]
        for version, losses in ((1, "radpo1_per_example"), (2, "radpo2_per_example_alpha0p5")):
            config = RaDPOConfig(beta=paper.inputs["beta"], version=version, **values)
            loss = radpo(config, paper.pairs(RADPO.want(config)))
            close(loss.values, expected[losses])
            close(loss.metrics["risk/chosen"], expected["seq_chosen"])
            close(loss.metrics["risk/rejected"], expected["seq_rejected"])


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("values", [{"risk": "kl"}, {"mu": 1.0}, {"risk": "cvar_lower", "mu": 1.0}])
def test_is_tdpo_where_the_risk_is_the_kl(version: int, values: dict) -> None:
    file = golden("radpo_paper_risk_measures")
    ours, theirs = RaDPOConfig(version=version, **values), TDPO.config(version=version)
    losses = [one(config, file.pairs(one.want(config))).values for one, config in ((RADPO, ours), (TDPO, theirs))]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-12)


def test_by_hand() -> None:
    """beta 0.5; log-ratios 1 and -1, risks 0.4 and 0.8.

    Version 1: rewards 0.7 and -0.1. Version 2, alpha 0.5: 0.5 * (1 + 0.2) = 0.6 and 0.5 * (-1 + 0.4) = -0.3.
    """
    for version, chosen, rejected in ((1, 0.7, -0.1), (2, 0.6, -0.3)):
        loss = radpo(RaDPOConfig(beta=0.5, version=version), pairs())
        close(loss.metrics["rewards/chosen"], [chosen])
        close(loss.metrics["rewards/rejected"], [rejected])
        close(loss.values, [math.log1p(math.exp(rejected - chosen))])


def test_version_2_holds_the_chosen_risk() -> None:
    """Its gradient is beta * alpha * sigmoid(-margin) on the rejected side and nothing on the chosen one."""
    batch = pairs()
    radpo(RaDPOConfig(beta=0.5), batch).values.sum().backward()
    assert batch.chosen["risk"].grad is None
    close(batch.rejected["risk"].grad, [0.25 / (1 + math.exp(0.9))])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"version": 3}, "objective: version = 3: Input should be 1 or 2"),
        ({"mu": 0}, "objective: mu = 0: Input should be greater than 0"),
        ({"mu": 5}, "objective: mu = 5: the share of cvar_upper is at most 1"),
        ({"risk": "official", "mu": 1}, "objective: mu = 1: the confidence level of official is below 1"),
        ({"risk": "cvar"}, "objective: risk = 'cvar': Input should be 'kl', 'cvar_upper', 'cvar_lower', 'erm_upper',"),
    ],
)
def test_refusals(values: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(RaDPOConfig, values, "objective")
    assert str(error.value).startswith(message)


def test_cached_log_probs_are_refused() -> None:
    run = load_run("radpo", overrides=["model=policy", "data=pairs.jsonl", "reference=cached"])
    with pytest.raises(UserError, match=r"^reference.kind = 'cached': radpo reads the reference over the whole vocabulary"):
        kind_of(run)


def pairs() -> Pairs:
    """One pair of one-token completions: log-ratios 1 and -1, risks 0.4 and 0.8."""

    def one(logratio: float, risk: float) -> Completions:
        number = lambda value: torch.tensor([value], dtype=torch.float64)  # noqa: E731
        return Completions(
            logps=number(logratio).requires_grad_(),
            lengths=torch.tensor([1]),
            reference_logps=number(0.0),
            more={"risk": number(risk).requires_grad_()},
        )

    return Pairs(chosen=one(1.0, 0.4), rejected=one(-1.0, 0.8))
