"""EXO against TRL, the authors' label and numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from golden import close, golden
from hand import at_the_ends, pairs, slopes

from posttrain.objectives.preference.exo import EXOConfig, exo
from posttrain.registry import find
from posttrain.schema import UserError, parse


def test_released_code_of_trl() -> None:
    """To 1e-7: TRL keeps eps in float32."""
    official = golden("baseline_trl_exo_pair")
    config = EXOConfig(beta=official.inputs["beta"], label_smoothing=official.inputs["label_smoothing"])
    official.agree(find("exo"), config, atol=1e-7)


def test_by_hand() -> None:
    """beta 0.5, log-ratios 2 log 3 apart: margin log 3, s = 3/4. At eps 1/4 the label is (3/4, 1/4): loss 0, the minimum.

    With eps 1/2: 3/4 log(3/2) + 1/4 log(1/2).
    """
    batch = pairs([2 * math.log(3)], [0.0])
    least = exo(EXOConfig(label_smoothing=0.25), batch)
    close(least.values, [0.0], 1e-12)
    close(slopes(least, batch)[0], [0.0], 1e-12)
    even = exo(EXOConfig(label_smoothing=0.5), batch)
    close(even.values, [0.75 * math.log(1.5) - 0.25 * math.log(2)])


def test_authors_label() -> None:
    """s (log s - 0) + (1 - s) (log(1 - s) + 10), at s = 3/4."""
    loss = exo(EXOConfig(released=True), pairs([2 * math.log(3)], [0.0]))
    close(loss.values, [0.75 * math.log(0.75) + 0.25 * (math.log(0.25) + 10)])


@pytest.mark.parametrize(("released", "start"), [(False, -math.log(2 * math.sqrt(0.999 * 0.001))), (True, 5 - math.log(2))])
def test_start(released: bool, start: float) -> None:
    config = EXOConfig(released=released)
    close(exo(config, pairs([0.0], [0.0])).values, [start], 1e-12)
    assert find("exo").start(config) == pytest.approx(start, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("released", [False, True])
def test_ends(released: bool, dtype: torch.dtype) -> None:
    """A reverse KL has no gradient where it is far off; it has none that is wrong."""
    chosen, rejected, gradients = at_the_ends(find("exo"), EXOConfig(released=released), dtype=dtype)
    out_of_order = chosen <= rejected
    assert (gradients[0][out_of_order] <= 0).all() and (gradients[1][out_of_order] >= 0).all()


@pytest.mark.parametrize("eps", [0, 1])
def test_label_must_be_smoothed(eps: float) -> None:
    with pytest.raises(UserError, match=rf"^exo: label_smoothing = {eps}: Input should be (greater|less) than {eps}$"):
        parse(EXOConfig, {"label_smoothing": eps}, "exo")
