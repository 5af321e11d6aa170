"""DCO against independent float64 formulas, numbers worked by hand, its optimum, SFT, and log-probs whose p no float holds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import close, golden, tensor
from hand import completions
from rows import by_definition

from posttrain.objectives.supervised.dco import DCOConfig, dco
from posttrain.objectives.supervised.sft import SFTConfig, sft
from posttrain.registry import find
from posttrain.schema import UserError, parse
from posttrain.stats import Answers, Completions, Loss

FILE = json.loads((Path(__file__).parents[1] / "goldens" / "dco.json").read_text())
LOGITS = tensor(FILE["inputs"]["policy_logits"])  # [B, T, V]
MASK = tensor(FILE["inputs"]["mask"]) > 0  # [B, T]

every_case = pytest.mark.parametrize("case", FILE["cases"], ids=lambda case: f"N {case['N']}")


def from_logits(logits: torch.Tensor) -> Answers:
    """The completions of the file, of these logits [B, T, V]."""
    rows = logits[MASK], logits[MASK].detach(), torch.tensor(FILE["inputs"]["tokens"])[MASK]
    return Answers(completion=Completions(logps=by_definition(*rows, ["logp"])["logp"], lengths=MASK.sum(1)))


def at(logps: list[float], samples: int, dtype: torch.dtype = torch.float64) -> tuple[Loss, torch.Tensor]:
    """The loss of completions of one token with these log-probs, and its gradient with respect to them."""
    answers = Answers(completion=completions([[value] for value in logps], dtype=dtype))
    loss = dco(DCOConfig(samples=samples), answers)
    (gradient,) = torch.autograd.grad(loss.values.sum(), answers.completion.logps)
    return loss, gradient


@every_case
def test_from_logits(case: dict[str, Any]) -> None:
    """The gradient, of the mean over rows, is in the file that of cross-entropy times F."""
    logits = LOGITS.clone().requires_grad_()
    loss = dco(DCOConfig(samples=case["N"]), from_logits(logits))
    assert loss.per == "row"
    close(loss.values, case["per_example_loss"], 1e-12)
    close(loss.metrics["dco/factor"], case["F"], 1e-12)
    close(loss.metrics["dco/coverage"], [math.exp(-value) for value in case["per_example_loss"]], 1e-12)
    (gradient,) = torch.autograd.grad(loss.values.mean(), logits)
    close(gradient, case["grad_policy_logits"], 1e-12)


@every_case
def test_released_form(case: dict[str, Any]) -> None:
    """The sum has the gradient of the loss; the mean that of each row over its number of tokens, here 4 and 3."""
    logits = LOGITS.clone().requires_grad_()
    answers = from_logits(logits)
    total, mean = (dco(DCOConfig(samples=case["N"], released=form), answers).values for form in ("sum", "mean"))
    close(total.mean(), case["surrogate_sum_nll_times_F"], 1e-12)
    close(mean.mean(), case["surrogate_mean_nll_times_F"], 1e-12)
    exact = tensor(case["grad_policy_logits"])
    (gradient,) = torch.autograd.grad(total.mean(), logits, retain_graph=True)
    close(gradient, exact.tolist(), 1e-12)
    (gradient,) = torch.autograd.grad(mean.mean(), logits)
    close(gradient, (exact / MASK.sum(1)[:, None, None]).tolist(), 1e-12)


@pytest.mark.parametrize(("dtype", "close_to"), [(torch.float64, 1e-13), (torch.float32, 3e-6)])
@pytest.mark.parametrize("row", FILE["table"], ids=lambda row: f"N {row['N']}")
def test_digits(row: dict[str, Any], dtype: torch.dtype, close_to: float) -> None:
    """Loss and gradient from log p = -800 to -1e-6 keep their relative digits, down to what float32 holds."""
    loss, gradient = at(row["logp"], row["N"], dtype)
    for got, expected in ((loss.values, row["loss"]), (loss.metrics["dco/factor"], row["F"]), (-gradient, row["F"])):
        torch.testing.assert_close(got.double(), tensor(expected), rtol=close_to, atol=1e-37)


@pytest.mark.parametrize("samples", golden("dco_loss").inputs["N"])
def test_independent_formula(samples: int) -> None:
    """Another float64 formula, which has no p left at its last log-prob, -60: there the limit."""
    file = golden("dco_loss")
    logps, expected = file.inputs["sequence_logprob"], file.outputs[f"N{samples}"]
    loss, _ = at(logps, samples)
    assert logps[-1] == -60.0 and math.isinf(expected["loss"][-1])
    close(loss.values, [*expected["loss"][:-1], 60 - math.log(samples)], 1e-11)
    close(loss.metrics["dco/factor"], [*expected["F"][:-1], 1.0], 1e-11)


def test_by_hand() -> None:
    """Two tokens of 1/2 and 2/3: p = 1/3. Of two samples one: 1 - 4/9 = 5/9; F = 2 * 2/3 * 1/3 / (5/9) = 4/5 at each token."""
    answers = Answers(completion=completions([[math.log(1 / 2), math.log(2 / 3)]]))
    loss = dco(DCOConfig(samples=2), answers)
    close(loss.values, [math.log(9 / 5)])
    close(loss.metrics["dco/coverage"], [5 / 9])
    close(loss.metrics["dco/factor"], [4 / 5])
    (gradient,) = torch.autograd.grad(loss.values.sum(), answers.completion.logps)
    close(gradient, [-4 / 5, -4 / 5])
    nll = math.log(3)
    close(dco(DCOConfig(samples=2, released="sum"), answers).values, [4 / 5 * nll])
    close(dco(DCOConfig(samples=2, released="mean"), answers).values, [4 / 5 * nll / 2])


def test_one_sample_is_sft() -> None:
    """The sum over tokens; the released mean is `sft` over rows, value and gradient."""
    answers = Answers(completion=completions([[-1.0, -3.0], [-5.0]]))
    close(dco(DCOConfig(samples=1), answers).values, [4.0, 5.0])
    ours, theirs = dco(DCOConfig(samples=1, released="mean"), answers), sft(SFTConfig(nll="rows"), answers)
    close(ours.values, theirs.values.tolist())
    gradients = [torch.autograd.grad(loss.values.sum(), answers.completion.logps)[0] for loss in (ours, theirs)]
    close(gradients[0], gradients[1].tolist())


def test_optimum() -> None:
    """Two answers, the first in 16 of 21 rows. At its probability 2/3 with N = 2 the slopes, 2 (1 - p) / (p (2 - p)) = 3/4 and
    2 p / (1 - p^2) = 12/5, weigh the same: 16 * 3/4 = 5 * 12/5. SFT goes on to 16/21."""
    for samples, best in ((2, 2 / 3), (1, 16 / 21)):
        logits = tensor([math.log(best), math.log(1 - best)]).requires_grad_()
        logps = logits.log_softmax(0)[[0] * 16 + [1] * 5]
        answers = Answers(completion=Completions(logps=logps, lengths=torch.ones(21, dtype=torch.int64)))
        (gradient,) = torch.autograd.grad(dco(DCOConfig(samples=samples), answers).values.mean(), logits)
        close(gradient, [0.0, 0.0], 1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("samples", [1, 2, 256, 10**9])
def test_p_that_no_float_holds(samples: int, dtype: torch.dtype) -> None:
    """-log N - log p and the gradient of cross-entropy, on either side of where the loss becomes linear, too."""
    logps = [-1e5, -1000.0, -104.0, -87.5, -60.001, -60.0, -59.999]
    loss, gradient = at(logps, samples, dtype)
    expected = [-value - math.log(samples) for value in logps]
    torch.testing.assert_close(loss.values.double(), tensor(expected), rtol=2e-7 if dtype == torch.float32 else 1e-14, atol=0)
    close(gradient, [-1.0] * len(logps), 3e-7 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("samples", [1, 2, 256, 10**9])
def test_a_certain_completion(samples: int, dtype: torch.dtype) -> None:
    """A log-prob of 0, or above it by rounding, has loss 0, and no gradient but that of cross-entropy for a single sample."""
    loss, gradient = at([0.0, 1e-7, -1e-30, -1e-20], samples, dtype)
    close(loss.values, [0.0] * 4, 1.1e-7)
    close(gradient, [-1.0 if samples == 1 else 0.0] * 4, 3e-6)
    close(loss.metrics["dco/coverage"], [1.0] * 4, 2e-7)


@pytest.mark.parametrize("released", [None, "mean", "sum"])
def test_a_completion_without_tokens(released: str | None) -> None:
    """It is certain: loss 0, and nothing changes for the one beside it."""
    both, alone = (Answers(completion=completions(rows)) for rows in ([[], [-1.0, -2.0]], [[-1.0, -2.0]]))
    config = DCOConfig(samples=16, released=released)
    close(dco(config, both).values, [0.0, dco(config, alone).values.item()])
    gradients = [torch.autograd.grad(dco(config, one).values.sum(), one.completion.logps)[0] for one in (both, alone)]
    close(gradients[0], gradients[1].tolist())


def test_gradcheck_across_the_range() -> None:
    logps = tensor([-400.0, -61.0, -59.0, -7.0, -0.7, -0.69, -0.01]).requires_grad_()
    for samples in (1, 3, 256):
        config, lengths = DCOConfig(samples=samples), torch.ones(7, dtype=torch.int64)
        assert torch.autograd.gradcheck(
            lambda values, config=config, lengths=lengths: (
                dco(config, Answers(completion=Completions(logps=values, lengths=lengths))).values
            ),
            [logps],
        )


def test_reads_no_reference() -> None:
    method = find("dco")
    assert not method.reads_reference(method.config()) and method.start(method.config()) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"samples": 0}, "dco: samples = 0: Input should be greater than or equal to 1"),
        ({"samples": 10**10}, "dco: samples = 10000000000: Input should be less than or equal to 1000000000"),
        ({"released": "tokens"}, "dco: released = 'tokens': Input should be 'mean' or 'sum'"),
    ],
)
def test_refused_settings(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(DCOConfig, values, "dco")
    assert str(error.value) == message
