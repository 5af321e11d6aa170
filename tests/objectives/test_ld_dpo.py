"""LD-DPO against TRL, DPO and numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from golden import close, golden
from hand import at_the_ends, completions, slopes

from posttrain.objectives.preference.dpo import DPOConfig, dpo
from posttrain.objectives.preference.ld_dpo import LDDPOConfig, ld_dpo
from posttrain.registry import find
from posttrain.schema import UserError, parse
from posttrain.stats import Pairs


def test_released_code() -> None:
    official = golden("baseline_trl_ld_dpo")
    official.agree(find("ld_dpo"), LDDPOConfig(beta=official.inputs["beta"], alpha=official.inputs["ld_alpha"]))


def by_hand() -> Pairs:
    """Log-ratios 1, 2, 4 against 3; then 1 against -1, -2."""
    return Pairs(chosen=completions([[1.0, 2.0, 4.0], [1.0]]), rejected=completions([[3.0], [-1.0, -2.0]]))


def test_by_hand() -> None:
    """alpha 0.5: 1 + (2 + 4) / 2 = 4 against 3; 1 against -1 - 1 = -2. At beta 1, m = 1 and 3."""
    batch = by_hand()
    loss = ld_dpo(LDDPOConfig(beta=1), batch)
    close(loss.metrics["rewards/chosen"], [4.0, 1.0])
    close(loss.metrics["rewards/rejected"], [3.0, -2.0])
    close(loss.values, [math.log1p(math.exp(-1)), math.log1p(math.exp(-3))])
    first, second = 1 / (1 + math.e), 1 / (1 + math.exp(3))
    chosen, rejected = slopes(loss, batch)
    close(chosen, [-first, -first / 2, -first / 2, -second])
    close(rejected, [first, second, second / 2])


def test_alpha_0_reads_the_common_length_only() -> None:
    batch = by_hand()
    chosen, rejected = slopes(ld_dpo(LDDPOConfig(alpha=0), batch), batch)
    assert (chosen[1:3] == 0).all() and rejected[2] == 0 and (chosen[[0, 3]] < 0).all()


def test_alpha_1_is_dpo() -> None:
    close(ld_dpo(LDDPOConfig(alpha=1), by_hand()).values, dpo(DPOConfig(), by_hand()).values.tolist(), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ends(dtype: torch.dtype) -> None:
    chosen, rejected, gradients = at_the_ends(find("ld_dpo"), LDDPOConfig(), dtype=dtype)
    out_of_order = chosen <= rejected
    assert (gradients[0][out_of_order] < 0).all() and (gradients[1][out_of_order] > 0).all()


def test_alpha_is_a_share() -> None:
    with pytest.raises(UserError, match=r"^ld_dpo: alpha = 1.5: Input should be less than or equal to 1$"):
        parse(LDDPOConfig, {"alpha": 1.5}, "ld_dpo")
