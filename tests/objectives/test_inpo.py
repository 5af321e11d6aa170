"""INPO against the authors' code, logits by an independent formula, numbers worked by hand, IPO, and its expected step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import close, golden, tensor
from hand import EXTREMES, completions, pairs, slopes

from posttrain.objectives.preference.inpo import ContestedPairs, INPOConfig, inpo
from posttrain.objectives.preference.ipo import IPOConfig, ipo
from posttrain.registry import find
from posttrain.schema import UserError, parse
from posttrain.stats import Completions, Pairs, columns_of, roles_of

INPO = find("inpo")
CASES = golden("inpo_official_loss").outputs["cases"]
LOGITS = json.loads((Path(__file__).parents[1] / "goldens" / "t2_inpo.json").read_text())


def contested(batch: Pairs, chosen: list[float], rejected: list[float], won: list[float] | None = None) -> ContestedPairs:
    """The same pairs with these log-probs of the last iterate; the chosen one wins for sure where nothing is said."""
    return ContestedPairs(
        chosen=batch.chosen,
        rejected=batch.rejected,
        previous_chosen=tensor(chosen),
        previous_rejected=tensor(rejected),
        preference=tensor(won or [1.0] * len(chosen)),
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_released_code(case: dict[str, Any]) -> None:
    """Losses, gradients of their mean and h. Its rewards leave out the last iterate; they follow from ours."""
    files = golden("inpo_official_loss").inputs
    sides = [[[value] for value in files[f"{model}_{role}_logps"]] for role in ("chosen", "rejected") for model in _MODELS]
    batch = contested(
        Pairs(chosen=completions(*sides[:2]), rejected=completions(*sides[2:])),
        files["last_chosen_logps"],
        files["last_rejected_logps"],
    )
    loss = inpo(INPOConfig(eta=case["eta"], ratio=case["ratio_tau_over_eta"]), batch)
    close(loss.values, case["losses"])
    close(loss.values.mean(), case["loss_mean"])
    close(loss.metrics["inpo/h"], case["h"])
    close(loss.metrics["rewards/margins"], [case["eta"] * h for h in case["h"]])
    for role in ("chosen", "rejected"):
        (gradient,) = torch.autograd.grad(loss.values.mean(), getattr(batch, role).logps, retain_graph=True)
        close(gradient, case[f"grad_policy_{role}"])


_MODELS = ("policy", "reference")


@pytest.mark.parametrize("case", LOGITS["cases"], ids=lambda case: f"eta {case['eta']}")
def test_from_logits(case: dict[str, Any]) -> None:
    """An independent formula on logits, its gradients by finite differences."""
    sides = {role: _from_logits(role) for role in ("chosen", "rejected")}
    last = LOGITS["prev_policy_sum_logp"]
    batch = contested(Pairs(**{role: side for role, (side, _) in sides.items()}), last["chosen"], last["rejected"])
    loss = inpo(INPOConfig(eta=case["eta"], ratio=case["tau"] / case["eta"]), batch)
    close(loss.values, case["per_example_loss"], 1e-8)
    for role, (_, logits) in sides.items():
        (gradient,) = torch.autograd.grad(loss.values.mean(), logits, retain_graph=True)
        close(gradient, case[f"grad_policy_{role}_logits"], 1e-5)


def _from_logits(role: str) -> tuple[Completions, torch.Tensor]:
    """The completions of a role, and the policy's logits as a leaf."""
    inputs = LOGITS["inputs"]
    mask, tokens = tensor(inputs[f"{role}_mask"]) > 0, torch.tensor(inputs[f"{role}_tokens"])[..., None]
    policy, reference = tensor(inputs[f"policy_{role}_logits"]).requires_grad_(), tensor(inputs[f"ref_{role}_logits"])
    logps, reference_logps = (logits.log_softmax(-1).gather(-1, tokens)[..., 0][mask] for logits in (policy, reference))
    return Completions(logps=logps, lengths=mask.sum(1), reference_logps=reference_logps), policy


def test_by_hand() -> None:
    """eta 1/4, so c = 2; ratio 1/2. Policy 3 and 1, reference 0 (a margin of 0), last iterate 2 and 4 (a margin of -2).

    h = 2 - 0 + 1 = 3: loss 1, slope 2. Rewards (3 - 1) / 4 and (1 - 2) / 4. With p = 3/4 the soft loss is
    3/4 * 1 + 1/4 * 25 = 7, its slope 2 (h - (2p - 1) c) = 4.
    """
    batch = contested(pairs([3.0], [1.0]), [2.0], [4.0], [0.75])
    hard = inpo(INPOConfig(eta=0.25, ratio=0.5), batch)
    close(hard.values, [1.0])
    close(hard.metrics["rewards/chosen"], [0.5])
    close(hard.metrics["rewards/rejected"], [-0.25])
    close(hard.metrics["inpo/margin_reference"], [0.0])
    close(hard.metrics["inpo/margin_previous"], [-2.0])
    chosen, rejected = slopes(hard, batch)
    close(chosen, [2.0])
    close(rejected, [-2.0])
    soft = inpo(INPOConfig(eta=0.25, ratio=0.5, labels="soft"), batch)
    close(soft.values, [7.0])
    close(slopes(soft, batch)[0], [4.0])
    close(soft.metrics["inpo/preference"], [0.75])


def test_the_reference_alone_is_ipo() -> None:
    batch = contested(pairs([1.0, -2.0], [0.5, 3.0]), [-7.0, 5.0], [2.0, 0.0])
    close(inpo(INPOConfig(eta=0.1, ratio=1.0), batch).values, ipo(IPOConfig(beta=0.1), batch).values.tolist())


def test_soft_labels_are_the_mean_over_who_wins() -> None:
    """p of one order and 1 - p of the other are the same pair."""
    one = contested(pairs([3.0], [1.0]), [2.0], [4.0], [0.7])
    other = contested(pairs([1.0], [3.0]), [4.0], [2.0], [0.3])
    config = INPOConfig(eta=0.25, labels="soft")
    close(inpo(config, one).values, inpo(config, other).values.tolist())
    hard = [inpo(INPOConfig(eta=0.25), batch).values.item() for batch in (one, other)]
    close(inpo(config, one).values, [0.7 * hard[0] + 0.3 * hard[1]])


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_ends(labels: str) -> None:
    chosen, rejected = [one for one in EXTREMES for _ in EXTREMES], list(EXTREMES) * len(EXTREMES)
    batch = contested(pairs(chosen, rejected, torch.float32), rejected, chosen, [0.5] * len(chosen))
    loss = inpo(INPOConfig(labels=labels), batch)
    assert loss.values.dtype == torch.float32 and loss.values.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in slopes(loss, batch))


def test_takes_its_numbers_from_the_rows() -> None:
    assert roles_of(ContestedPairs) == ["chosen", "rejected"]
    assert list(columns_of(ContestedPairs)) == ["previous_chosen", "previous_rejected", "preference"]
    assert INPO.family is ContestedPairs and INPO.reads_reference(INPO.config())


def test_the_share_of_the_reference_is_between_0_and_1() -> None:
    with pytest.raises(UserError, match=r"^inpo: ratio = 1.5: Input should be less than or equal to 1$"):
        parse(INPOConfig, {"ratio": 1.5}, "inpo")
