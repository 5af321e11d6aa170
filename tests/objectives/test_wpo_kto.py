"""WPO on KTO against numbers worked by hand, and against KTO."""

from __future__ import annotations

import dataclasses
from math import exp

import pytest
import torch
from golden import close
from hand import completions
from random_statistics import leaves, random_statistics

from posttrain.objectives.preference.kto import KTOConfig, kto
from posttrain.objectives.preference.wpo_kto import WPOKTOConfig, wpo_kto
from posttrain.registry import find
from posttrain.schema import UserError, parse
from posttrain.stats import Labelled

WPO_KTO = find("wpo_kto")


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def with_context(config: WPOKTOConfig, rows: Labelled, *parts: Labelled) -> Labelled:
    """The rows with the context of a step of `parts`, or of them alone; their mismatched completions stay behind."""
    found = [WPO_KTO.before(config, part) for part in parts or [rows]]
    context = {name: torch.cat([one[name] for one in found]).mean() for name in found[0]}
    return dataclasses.replace(rows, mismatched=None, context=context)


def labelled(logps: list[float], log_w: list[float], label: list[float], mismatched: float) -> Labelled:
    """Rows of one token with these log-probs (the reference's are 0) and log-weights; z0 from mismatched ones of one value."""
    one = completions([[value] for value in logps])
    one = dataclasses.replace(one, more={"log_sum_p2": one.logps.detach() - torch.tensor(log_w, dtype=torch.float64)})
    return Labelled(completion=one, label=torch.tensor(label), mismatched=completions([[mismatched]] * len(logps)))


def test_by_hand() -> None:
    """beta 1/2, z0 2. Desirable rows of weights 1 and 3, log-ratios 4 and 0; one undesirable of weight 0.2, log-ratio -4.

    u = 1/4, 3/4 and 1; the values, of which the mean over the 3 rows is the loss, are 3 times that.
    """
    config = WPOKTOConfig(beta=0.5, desirable_weight=2.0)
    logs = torch.tensor([1.0, 3.0, 0.2]).log().tolist()
    rows = with_context(config, labelled([4.0, 0.0, -4.0], logs, [1.0, 1.0, 0.0], 2.0))
    loss = wpo_kto(config, rows)
    u = [0.25 * 2, 0.75 * 2, 1.0]
    close(loss.values, [3 * u[0] * sigmoid(-1), 3 * u[1] * sigmoid(1), 3 * u[2] * sigmoid(-3)], 1e-6)  # log_w is float32
    (slope,) = torch.autograd.grad(loss.values.mean(), rows.completion.logps)
    bend = [sigmoid(x) * sigmoid(-x) / 2 for x in (1, 1, 3)]
    close(slope, [-u[0] * bend[0], -u[1] * bend[1], u[2] * bend[2]], 1e-6)
    close(loss.metrics["wpo/weight"], [1.0, 3.0, 0.2], 1e-6)
    close(loss.metrics["kl/z0"], 2.0)


def test_equal_weights_and_equal_kinds_are_twice_kto() -> None:
    config = WPOKTOConfig(beta=0.1, desirable_weight=1.2)
    rows = with_context(config, labelled([1.0, -2.0, 0.5, 3.0], [-0.7] * 4, [1.0, 0.0, 0.0, 1.0], 0.3))
    twice = 2 * kto(KTOConfig(beta=0.1, desirable_weight=1.2), rows).values
    close(wpo_kto(config, rows).values, twice.tolist())


def test_the_kinds_count_the_same_whatever_their_numbers() -> None:
    """At the reference every row has half its lambda: the mean is (lambda_D + lambda_U) / 2, or of one kind half of its own."""
    config = WPOKTOConfig(desirable_weight=1.5)
    for label, expected in (([1.0, 1.0, 1.0, 0.0], 1.25), ([1.0, 0.0, 0.0, 0.0], 1.25), ([1.0] * 4, 0.75), ([0.0] * 4, 0.5)):
        rows = with_context(config, labelled([0.0] * 4, [0.4, -1.0, 0.0, -2.0], label, 0.0))
        close(wpo_kto(config, rows).values.mean(), expected)


def test_the_sum_is_over_the_step_not_the_micro_batch() -> None:
    config = WPOKTOConfig()
    whole = labelled([1.0, -2.0, 0.5, 3.0], [0.4, -1.0, 0.0, -2.0], [1.0, 0.0, 1.0, 1.0], 0.0)
    parts = [
        labelled([1.0], [0.4], [1.0], 0.0),
        labelled([-2.0, 0.5, 3.0], [-1.0, 0.0, -2.0], [0.0, 1.0, 1.0], 0.0),
    ]
    split = [wpo_kto(config, with_context(config, part, *parts)).values for part in parts]
    close(torch.cat(split), wpo_kto(config, with_context(config, whole)).values.tolist())


@pytest.mark.parametrize("alignment", ["sampled", "greedy", "none"])
def test_alignments(alignment: str) -> None:
    """The gradient is KTO's times u, which is a constant; u is w over the sum of its kind."""
    config = WPOKTOConfig(beta=0.1, alignment=alignment)
    rows = random_statistics(Labelled, want=["log_sum_p2", "max_logp"], rows=5)
    rows = with_context(config, dataclasses.replace(rows, mismatched=rows.completion))
    one, label = rows.completion, rows.label
    shift = {"sampled": one["log_sum_p2"], "greedy": one["max_logp"], "none": torch.zeros_like(one.logps)}[alignment]
    w = one.mean(one.logps - shift).exp().detach()
    u = w * torch.where(label > 0, 5 / (w * label).sum(), 5 / (w * (1 - label)).sum())
    assert 0 < label.sum() < 5
    ours, theirs = wpo_kto(config, rows), kto(KTOConfig(beta=0.1), rows).values
    close(ours.values, (u * theirs).tolist())
    (slope,) = torch.autograd.grad(ours.values.sum(), leaves(rows), retain_graph=True)
    (expected,) = torch.autograd.grad((u * theirs).sum(), leaves(rows))
    close(slope, expected.tolist())


def test_weights_too_small_for_float32_are_no_weights() -> None:
    rows = labelled([1.0, 2.0], [-200.0, -300.0], [1.0, 0.0], 0.0)
    config = WPOKTOConfig()
    low = dataclasses.replace(rows.completion, logps=rows.completion.logps.detach().float().requires_grad_())
    low = dataclasses.replace(low, more={"log_sum_p2": rows.completion["log_sum_p2"].float()})
    rows = with_context(config, dataclasses.replace(rows, completion=low))
    assert (wpo_kto(config, rows).values == 0).all()


def test_settings() -> None:
    with pytest.raises(UserError, match=r"^objective: alignment = 'best': Input should be 'sampled', 'greedy' or 'none'$"):
        parse(WPOKTOConfig, {"alignment": "best"}, "objective")
    with pytest.raises(UserError, match=r"^objective: undesirable_weight = -1: Input should be greater than or equal to 0$"):
        parse(WPOKTOConfig, {"undesirable_weight": -1}, "objective")
