"""SLiC-HF against the paper's formula and numbers worked by hand."""

from __future__ import annotations

import pytest
import torch
from golden import close, golden
from hand import at_the_ends, completions, slopes

from posttrain.objectives.preference.slic import SLiCConfig, slic
from posttrain.registry import find
from posttrain.schema import UserError, parse
from posttrain.stats import Pairs


def test_paper_formula() -> None:
    paper = golden("baseline_rpo_slic")
    loss = slic(SLiCConfig(delta=paper.inputs["delta"], lam=paper.inputs["lambda_"]), paper.pairs())
    close(loss.values, paper.outputs["slic_per_example"])


def test_by_hand() -> None:
    """Log-probs -3 and -1 at delta 1: hinge 3, NLL 0.1 * 3; -1 and -3: hinge 0, only the NLL of 0.1 * 1 moves."""
    batch = Pairs(chosen=completions([[-1.0, -2.0], [-1.0]]), rejected=completions([[-1.0], [-3.0]]))
    loss = slic(SLiCConfig(), batch)
    close(loss.values, [3.3, 0.1])
    close(loss.metrics["hinge/satisfied"], [0.0, 1.0])
    chosen, rejected = slopes(loss, batch)
    close(chosen, [-1.1, -1.1, -0.1])
    close(rejected, [1.0, 0.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ends(dtype: torch.dtype) -> None:
    _, _, (chosen, _) = at_the_ends(find("slic"), SLiCConfig(), (0.0, -1.0, -30.0, -1000.0), dtype)
    assert (chosen < 0).all()


def test_delta_must_be_positive() -> None:
    with pytest.raises(UserError, match=r"^slic: delta = 0: Input should be greater than 0$"):
        parse(SLiCConfig, {"delta": 0}, "slic")
