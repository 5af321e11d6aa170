"""DAC-KL's reading R1 against an independent implementation in numpy, finite differences, and numbers worked by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from golden import close, tensor
from golden_taught import TaughtGolden, taught, taught_golden

from posttrain.objectives.distillation.dackl import DACKLConfig, dackl, log_gates
from posttrain.registry import find
from posttrain.schema import UserError, parse
from posttrain.stats import Sizes, Taught

DACKL = find("dackl")
SIZES = Sizes(hidden=4, vocabulary=23, reference_hidden=4, reference_layers=1)
R1 = DACKLConfig(k=23, hidden=8, ce_weight=0)
"""As in the reading: every item of the golden's vocabulary takes part, 8 hidden units."""


def parameters(config: DACKLConfig) -> dict[str, torch.Tensor]:
    """The network of the settings as it starts, in float64, leaves with gradient."""
    torch.manual_seed(3)
    return {name: value.double().requires_grad_() for name, value in DACKL.learned.start(config, SIZES).items()}


def with_window(rows: Taught, config: DACKLConfig, own: dict[str, torch.Tensor]) -> Taught:
    """The statistics with what the network says of them."""
    one = rows.completion
    return Taught(completion=replace(one, more={**one.more, **DACKL.learned.statistics(config, own, one)}))


def statistics(file: TaughtGolden, config: DACKLConfig, own: dict[str, torch.Tensor]) -> Taught:
    return with_window(file.taught(DACKL.want(config)), config, own)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def r1(z_s: np.ndarray, z_t: np.ndarray, own: dict[str, np.ndarray], x: np.ndarray | None = None) -> float:
    """The reading in numpy for one token; x: what the network reads, where it is held fixed."""
    p, q = softmax(z_t), softmax(z_s)
    order = np.argsort(-p)
    p, q = p[order], q[order]
    x = np.concatenate([p, q]) if x is None else x
    o = own["w2"] @ np.maximum(own["w1"] @ x + own["b1"], 0) + own["b2"]
    sigmoid = lambda value: 1 / (1 + np.exp(-value))  # noqa: E731
    upper, lower = 0.5 * sigmoid(o[0]), 0.5 + 0.5 * sigmoid(o[1])
    middle = np.cumsum(p) - p / 2
    m = sigmoid((middle - upper) / 0.05) * sigmoid((lower - middle) / 0.05)
    m[0] = 1
    p, q = m * p / (m * p).sum(), m * q / (m * q).sum()
    return float((p * np.log(p / q)).sum())


def reading(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    order = np.argsort(-p)
    return np.concatenate([p[order], q[order]])


def test_r1_in_numpy_and_finite_differences() -> None:
    """Value, gradient in the student's logits (the network's input is held), and gradient in each of its parameters."""
    file, own = taught_golden("mgsr_span_and_scrg"), parameters(R1)
    losses = dackl(R1, statistics(file, R1, own)).values
    gradients = torch.autograd.grad(losses.sum(), [file.student, *own.values()])
    z_s, z_t = (side.detach()[file.mask].numpy() for side in (file.student, file.teacher))
    plain = {name: value.detach().numpy() for name, value in own.items()}
    inputs = [reading(softmax(t), softmax(s)) for s, t in zip(z_s, z_t, strict=True)]

    def total(student: np.ndarray, network: dict[str, np.ndarray]) -> float:
        return sum(r1(s, t, network, x) for s, t, x in zip(student, z_t, inputs, strict=True))

    close(losses, [r1(s, t, plain) for s, t in zip(z_s, z_t, strict=True)], 1e-12)
    rng = np.random.default_rng(0)
    direction = rng.standard_normal(z_s.shape)
    finite = (total(z_s + 1e-6 * direction, plain) - total(z_s - 1e-6 * direction, plain)) / 2e-6
    close(torch.tensor((gradients[0][file.mask].numpy() * direction).sum()), finite, 1e-8)
    for name, gradient in zip(own, gradients[1:], strict=True):
        direction = rng.standard_normal(plain[name].shape)
        sides = [total(z_s, {**plain, name: plain[name] + step * direction}) for step in (1e-6, -1e-6)]
        close(torch.tensor((gradient.numpy() * direction).sum()), (sides[0] - sides[1]) / 2e-6, 1e-8)


def test_the_students_gradient_is_the_difference_of_the_two_windows() -> None:
    """dl/dz = q~ - p~ on the window's items: nothing flows through what the network reads."""
    file, own = taught_golden("mgsr_span_and_scrg"), parameters(R1)
    rows = statistics(file, R1, own)
    (gradient,) = torch.autograd.grad(dackl(R1, rows).values.sum(), file.student)
    one = rows.completion
    gates = log_gates(one["top_reference_logps"], one["window"], 0.05)
    p, q = ((one[name] + gates).softmax(-1) for name in ("top_reference_logps", "top_logps"))
    expected = torch.zeros(10, 23, dtype=torch.float64).scatter(1, one["top_ids"], q - p)
    torch.testing.assert_close(gradient[file.mask], expected, rtol=0, atol=1e-14)


def test_by_hand() -> None:
    """A window [0.4, 0.9] with sharp edges over p = (1/2, 1/4, 1/8, 1/8): C = 1/4, 5/8, 13/16, 15/16, so the last is cut off.

    The first is above the window, but stays: p~ = (4, 2, 1) / 7, and q = (1/4, 1/4, 1/4, 1/4) gives thirds.
    """
    config = DACKLConfig(k=4, window="fixed", bounds=(0.4, 0.9), softness=1e-4, ce_weight=0)
    student = tensor([[0.25] * 4]).log().requires_grad_()
    rows = taught(student, tensor([[0.125, 0.5, 0.125, 0.25]]).log(), torch.tensor([0]), DACKL.want(config))
    loss = dackl(config, rows)
    p = [4 / 7, 2 / 7, 1 / 7]
    close(loss.values, [sum(x * math.log(3 * x) for x in p)])
    close(loss.metrics["kept/teacher"], [7 / 8])
    close(loss.metrics["kept/student"], [3 / 4])
    close(loss.metrics["window/entropy"], [0.0])


def test_cross_entropy_has_weight_1() -> None:
    file = taught_golden("mgsr_span_and_scrg")
    config = DACKLConfig(window="fixed")
    rows = file.taught(DACKL.want(config))
    difference = dackl(config, rows).values - dackl(replace(config, ce_weight=0), rows).values
    close(difference, (-rows.completion.logps).tolist(), 1e-12)


def test_a_learned_window_starts_at_its_bounds() -> None:
    """Exactly where the network's output weights are 0; about there otherwise. A fixed window has no network."""
    file, own = taught_golden("mgsr_span_and_scrg"), parameters(R1)
    own["w2"] = torch.zeros_like(own["w2"])
    window = statistics(file, R1, own).completion["window"]
    close(window, [[0.05, 0.95]] * 10, 1e-7)  # the biases start in float32
    assert (statistics(file, R1, parameters(R1)).completion["window"] - window).abs().max() < 0.1
    assert DACKL.learned.start(DACKLConfig(window="fixed"), SIZES) == {}


def trained(config: DACKLConfig, steps: int = 200) -> torch.Tensor:
    """[N, 2] the window after training the network alone."""
    file, own = taught_golden("mgsr_span_and_scrg"), parameters(config)
    optimizer = torch.optim.Adam(own.values(), lr=0.1)
    rows = file.taught(DACKL.want(config))
    for _ in range(steps):
        optimizer.zero_grad()
        dackl(config, with_window(rows, config, own)).values.mean().backward(inputs=list(own.values()))
        optimizer.step()
    return with_window(rows, config, own).completion["window"].detach()


def test_the_window_collapses_to_its_floor_and_opens_when_reversed() -> None:
    """What the docstring warns of: minimising closes it to [1/2, 1/2] wherever it may, maximising opens it to [0, 1]."""
    closed, open_ = trained(R1), trained(replace(R1, dac_objective="reverse"))
    assert (closed[:, 1] - closed[:, 0]).mean() < 0.1
    assert (open_[:, 1] - open_[:, 0]).mean() > 0.9
    assert (closed[:, 0] <= 0.5).all() and (closed[:, 1] >= 0.5).all()


def test_reversing_turns_only_the_networks_gradient() -> None:
    file, own = taught_golden("mgsr_span_and_scrg"), parameters(R1)
    rows = statistics(file, R1, own)
    both = [dackl(config, rows).values for config in (R1, replace(R1, dac_objective="reverse"))]
    close(both[1], both[0].tolist(), 0)
    at = [torch.autograd.grad(values.sum(), [file.student, *own.values()], retain_graph=True) for values in both]
    torch.testing.assert_close(at[1][0], at[0][0], rtol=0, atol=1e-15)
    for one, other in zip(at[0][1:], at[1][1:], strict=True):
        torch.testing.assert_close(other, -one, rtol=0, atol=1e-15)


def test_a_vocabulary_smaller_than_k() -> None:
    """Missing items read as probability 0."""
    file, wide = taught_golden("mgsr_span_and_scrg"), replace(R1, k=64)
    own = parameters(wide)
    inside = {**own, "w1": torch.cat([own["w1"][:, :23], own["w1"][:, 64:87]], 1)}
    got, expected = statistics(file, wide, own).completion["window"], statistics(file, R1, inside).completion["window"]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-15)


def test_adjacent_tokens_against_the_golden() -> None:
    """The golden's spans hold every two adjacent tokens of its completions, 3, 3 and 1 pairs; its mean is over pairs."""
    file = taught_golden("mgsr_span_and_scrg")
    config = DACKLConfig(window="fixed", ce_weight=0, span="adjacent", span_weight=2)
    rows = file.taught(DACKL.want(config))
    loss = dackl(config, rows)
    spans = loss.metrics["span"]
    alone = dackl(replace(config, span="none"), rows).values
    close(loss.values - alone, (2 * spans).tolist(), 1e-14)
    starts = [0, 4, 8]
    assert (spans[starts] == 0).all() and (spans.count_nonzero() == 7)
    close(spans.sum() / 7, file.outputs["loss"])
    with_spans, without = (dackl(one, rows).values.sum() for one in (config, replace(config, span="none")))
    (gradient,) = torch.autograd.grad((with_spans - without) / (2 * 7), file.student)
    close(gradient, file.outputs["grad_student_logits"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"u_max": 0.7}, "u_max = 0.7 is above l_min = 0.5; the window would have nothing it must keep"),
        ({"bounds": [0.6, 0.9]}, "bounds = [0.6, 0.9]: a learned window starts within (0, u_max) and (l_min, 1)"),
        ({"bounds": [0.9, 0.2], "window": "fixed"}, "bounds = [0.9, 0.2]: the window would end before it begins"),
        ({"softness": 0}, "softness = 0: Input should be greater than 0"),
    ],
)
def test_refusals(values: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(DACKLConfig, values, "objective")
    assert message in str(error.value)
