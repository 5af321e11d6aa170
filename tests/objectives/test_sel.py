"""SEL against the paper's formulas and numbers worked by hand."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from golden import close, tensor
from golden_taught import taught, taught_golden

from posttrain.objectives.distillation.sel import SELConfig, sel
from posttrain.registry import find

SEL = find("sel")


@pytest.mark.parametrize(("file", "over"), [("sel_full", "vocabulary"), ("sel_partial", "token")])
def test_paper_formula(file: str, over: Literal["vocabulary", "token"]) -> None:
    taught_golden(file).agree(SEL, SELConfig(over=over))


def test_by_hand() -> None:
    """q = (1/4, 3/4), p = (1/2, 1/2): log 1/2 and log 3/2 apart; the token is the first item."""
    for over, squares in (("vocabulary", math.log(0.5) ** 2 + math.log(1.5) ** 2), ("token", math.log(0.5) ** 2)):
        config = SELConfig(over=over, ce_weight=2.0)
        rows = taught(tensor([[0.25, 0.75]]).log(), tensor([[0.5, 0.5]]).log(), torch.tensor([0]), SEL.want(config))
        close(sel(config, rows).values, [squares / 2 + 2 * math.log(4)])


def test_the_token_alone_needs_no_statistic_over_the_vocabulary() -> None:
    assert SEL.want(SELConfig(over="token")) == ()


def test_at_sampled_tokens_it_is_not_biased() -> None:
    """Its gradient vanishes at q = p for every token, so in the mean over tokens of the teacher; p_y-weighted CE's does not."""
    logits = torch.randn(5, 5, dtype=torch.float64)[:1].expand(5, 5).clone().requires_grad_()
    config = SELConfig(over="token")
    loss = sel(config, taught(logits, logits.detach(), torch.arange(5), SEL.want(config)))
    close(torch.autograd.grad(loss.values.sum(), logits)[0], torch.zeros(5, 5).tolist(), 1e-15)
