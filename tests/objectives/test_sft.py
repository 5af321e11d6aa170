"""Supervised fine-tuning against TRL and numbers worked by hand."""

from __future__ import annotations

import pytest
import torch
from golden import close, golden
from hand import completions

from posttrain.objectives.supervised.sft import SFTConfig, sft
from posttrain.registry import find
from posttrain.schema import UserError, parse
from posttrain.stats import Answers


def test_released_code() -> None:
    """TRL's `sft` loss is that of the chosen completions."""
    official = golden("baseline_trl_sft")
    loss = sft(SFTConfig(), Answers(completion=official.pairs().chosen))
    assert loss.per == "completion"
    close(loss.values.mean(), official.outputs["loss"])
    (gradient,) = torch.autograd.grad(loss.values.mean(), official.policy_logits)
    close(gradient, official.outputs["grad_policy_logits"])


def test_by_hand() -> None:
    """Tokens: (1 + 3 + 5) / 3 = 3. Rows: the means 2 and 5, in the mean 3.5."""
    answers = Answers(completion=completions([[-1.0, -3.0], [-5.0]]))
    tokens, rows = sft(SFTConfig(), answers), sft(SFTConfig(nll="rows"), answers)
    close(tokens.values, [1.0, 3.0, 5.0])
    close(tokens.values.mean(), 3.0)
    assert rows.per == "row"
    close(rows.values, [2.0, 5.0])
    (gradient,) = torch.autograd.grad(rows.values.sum(), answers.completion.logps)
    close(gradient, [-0.5, -0.5, -1.0])


def test_reads_no_reference() -> None:
    method = find("sft")
    assert not method.reads_reference(method.config()) and method.start(method.config()) is None


def test_the_mean_is_over_tokens_or_rows() -> None:
    with pytest.raises(UserError, match=r"^sft: nll = 'words': Input should be 'tokens' or 'rows'$"):
        parse(SFTConfig, {"nll": "words"}, "sft")
