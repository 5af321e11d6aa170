"""KTO against the authors' code, TRL and numbers worked by hand."""

from __future__ import annotations

from math import exp

import pytest
import torch
from golden import close, golden

from posttrain.objectives.preference.kto import KTOConfig, kto
from posttrain.registry import find
from posttrain.schema import UserError, parse
from posttrain.stats import Completions, Labelled

KTO = find("kto")


def config_of(inputs: dict[str, float]) -> KTOConfig:
    return KTOConfig(**{name: inputs[name] for name in ("beta", "desirable_weight", "undesirable_weight")})


@pytest.mark.parametrize("file", ["kto_trl_kto", "kto_trl_kto_weights", "kto_halos_mixed", "kto_halos_all_undesirable"])
def test_released_code(file: str) -> None:
    """HALOs sorts its losses, desirable rows first, and takes z0 through float32, which moves losses by less than 1e-9."""
    official = golden(file)
    config, rows = config_of(official.inputs), official.labelled()
    raw = KTO.before(config, rows)["z0_raw"].mean()
    close(raw.clamp(min=0), official.outputs.get("z0_float64", official.outputs["z0"]))
    losses = official.outputs.get("losses_in_batch_order")
    if losses is None:
        sides = iter(official.outputs["losses_desirable_then_undesirable"])
        at = {i: next(sides) for side in (1, 0) for i in range(5) if rows.label[i] == side}
        losses = [at[i] for i in range(5)]
    outputs = {**official.outputs, "per_example_losses": losses}
    rows = Labelled(completion=rows.completion, label=rows.label, context={"z0_raw": raw})
    loss = official.agree(KTO, config, outputs=outputs, statistics=rows)
    if "metrics" in outputs:
        close(loss.metrics["kl/z0"], outputs["metrics"]["kl"])
        close(loss.metrics["rewards/desirable"].mean(), outputs["metrics"]["rewards/chosen"])
        close(loss.metrics["rewards/undesirable"].mean(), outputs["metrics"]["rewards/rejected"])


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def labelled(h: list[float], label: list[float], z0_raw: float) -> Labelled:
    """Rows of one token with these log-ratios."""
    logps = torch.tensor(h, dtype=torch.float64, requires_grad=True)
    one = Completions(logps=logps, lengths=torch.ones(len(h), dtype=torch.int64), reference_logps=torch.zeros_like(logps))
    context = {"z0_raw": torch.tensor(z0_raw, dtype=torch.float64)}
    return Labelled(completion=one, label=torch.tensor(label), context=context)


def test_by_hand() -> None:
    """beta 1/2, z0 2: h - z0 = 2 and -6, so losses 3 sigmoid(-1) and sigmoid(-3); the slope is -+ weight beta s (1 - s)."""
    rows = labelled([4.0, -4.0], [1.0, 0.0], 2.0)
    loss = kto(KTOConfig(beta=0.5, desirable_weight=3.0), rows)
    close(loss.values, [3 * sigmoid(-1), sigmoid(-3)])
    (slope,) = torch.autograd.grad(loss.values.sum(), rows.completion.logps)
    close(slope, [-1.5 * sigmoid(1) * sigmoid(-1), 0.5 * sigmoid(3) * sigmoid(-3)])
    close(loss.metrics["rewards/desirable"], [2.0])
    close(loss.metrics["rewards/undesirable"], [-2.0])
    close(loss.metrics["saturated"], [0.0, 0.0])
    assert loss.metrics["count/desirable/sum"].sum() == loss.metrics["count/undesirable/sum"].sum() == 1


def test_a_negative_estimate_counts_as_zero_and_is_logged() -> None:
    loss = kto(KTOConfig(beta=1.0), labelled([1.0], [1.0], -3.0))
    close(loss.values, [sigmoid(-1)])
    assert (loss.metrics["kl/z0"], loss.metrics["kl/z0_raw"]) == (0, -3)


def test_one_class_only() -> None:
    loss = kto(KTOConfig(), labelled([1.0, 2.0], [0.0, 0.0], 0.0))
    assert loss.values.isfinite().all()
    assert len(loss.metrics["rewards/desirable"]) == 0 and len(loss.metrics["rewards/undesirable"]) == 2


def test_far_from_the_reference_losses_are_bounded_and_counted_as_saturated() -> None:
    rows = labelled([-1e4, 1e4, -1e4, 1e4, 41.0, 39.0], [1.0, 1.0, 0.0, 0.0, 1.0, 1.0], 0.0)
    loss = kto(KTOConfig(), rows)
    close(loss.values[:4], [1.0, 0.0, 0.0, 1.0])
    close(loss.metrics["saturated"], [1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    assert torch.autograd.grad(loss.values.sum(), rows.completion.logps)[0].isfinite().all()


def advice(config: KTOConfig, desirable: int, undesirable: int) -> list[str]:
    return list(KTO.advise(config, {"label": [1.0] * desirable + [0.0] * undesirable}))


@pytest.mark.parametrize(
    ("weights", "rows", "ratio", "fix"),
    [
        ((1, 1), (10, 100), "0.1", "desirable_weight 12.5"),
        ((1, 1), (100, 10), "10", "undesirable_weight 8"),
        ((2, 1), (80, 100), "1.6", "undesirable_weight 1.28"),
        ((1, 1), (98, 100), "0.98", "desirable_weight 1.28"),
    ],
)
def test_unequal_classes(weights: tuple[float, float], rows: tuple[int, int], ratio: str, fix: str) -> None:
    config = KTOConfig(desirable_weight=weights[0], undesirable_weight=weights[1])
    (line,) = advice(config, *rows)
    assert line == (
        f"kto: {rows[0]} desirable rows of weight {weights[0]}, {rows[1]} undesirable ones of weight {weights[1]}: "
        f"a ratio of {ratio}, advised is 1 to 1.5; --{fix} makes it 1.25"
    )
    name, value = fix.split()
    fixed = KTOConfig(**{"desirable_weight": weights[0], "undesirable_weight": weights[1], name: float(value)})
    assert advice(fixed, *rows) == []


@pytest.mark.parametrize("rows", [(100, 100), (150, 100)])
def test_equal_enough(rows: tuple[int, int]) -> None:
    assert advice(KTOConfig(), *rows) == []


def test_a_class_without_rows_or_weight() -> None:
    assert advice(KTOConfig(), 3, 0)[0].endswith("0 undesirable ones of weight 1: only one kind is learned from")
    assert advice(KTOConfig(desirable_weight=0), 3, 3)[0].endswith("only one kind is learned from")


def test_start_is_known_for_equal_weights() -> None:
    assert KTO.start(KTOConfig(desirable_weight=2, undesirable_weight=2)) == 1
    assert KTO.start(KTOConfig(desirable_weight=2)) is None


def test_settings() -> None:
    with pytest.raises(UserError, match=r"^objective: beta = 0: Input should be greater than 0$"):
        parse(KTOConfig, {"beta": 0}, "objective")
    with pytest.raises(UserError, match=r"^objective: desirable_weight = -1: Input should be greater than or equal to 0$"):
        parse(KTOConfig, {"desirable_weight": -1}, "objective")
