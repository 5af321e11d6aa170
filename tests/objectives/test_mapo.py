"""MaPO against the authors' code and numbers worked by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from golden import close, golden, tensor

from posttrain.masks import rescaled
from posttrain.objectives.preference.mapo import MaPOConfig, mapo
from posttrain.registry import find
from posttrain.schema import UserError, parse
from posttrain.stats import Activations, Completions, Pairs

MAPO = find("mapo")


def test_authors_code() -> None:
    """Three activations, one of each kind. The authors round the least and the largest to float32: hence 1e-7."""
    official = golden("sparsepo_mapo")
    kinds = ("mlp", "attention", "residual")
    config = MaPOConfig(beta=official.inputs["beta"], activations=kinds)
    means = [tensor(values).mean(-1)[:, :-1] for values in official.inputs["activations"]]  # [2B, S - 1] each
    pairs, half = official.pairs(("forward_kl",)), len(official.mask) // 2

    def one(completions: Completions, part: slice) -> Completions:
        given = {f"reference_{kind}": means[i][part][official.mask[part]][:, None] for i, kind in enumerate(kinds)}
        return dataclasses.replace(completions, more={**completions.more, **given})

    statistics = Pairs(chosen=one(pairs.chosen, slice(half)), rejected=one(pairs.rejected, slice(half, None)))
    loss = official.agree(MAPO, config, atol=1e-7, statistics=statistics)
    masks = torch.cat([loss.metrics["mask/chosen"], loss.metrics["mask/rejected"]])
    close(masks, tensor(official.outputs["mask"])[official.mask].tolist(), 1e-7)
    kl = torch.cat([loss.metrics["kl/chosen"], loss.metrics["kl/rejected"]])
    close(kl, official.outputs["masked_kl"], 1e-7)
    rewards = torch.cat([loss.metrics["rewards/chosen"], loss.metrics["rewards/rejected"]])
    close(rewards / config.beta - kl, official.outputs["masked_u"], 1e-6)


def test_by_hand() -> None:
    """beta 0.5. Chosen: MLPs (1, 3, 2) and (0, 1, 2), logits (2, 2, 2), all equal.

    MLP mask ((0, 1, 0.5) + (0, 0.5, 1)) / 2 = (0, 0.75, 0.75), with the logits' 1: (0.5, 0.875, 0.875).
    Log-ratios (1, 2, -1) -> U 1.375; KLs (1, 0, 2) -> Q 2.25; reward 1.8125. Rejected: one token, mask 1, U -1, Q 0.5.
    """
    batch = Pairs(
        chosen=one([1, 2, -1], [1, 0, 2], mlp=[[1, 0], [3, 1], [2, 2]], logits=[[2], [2], [2]]),
        rejected=one([-1], [0.5], mlp=[[4, 5]], logits=[[1]]),
    )
    loss = mapo(MaPOConfig(beta=0.5, activations=("mlp", "logits")), batch)
    close(loss.metrics["mask/chosen"], [0.5, 0.875, 0.875])
    close(loss.metrics["rewards/chosen"], [1.8125])
    close(loss.metrics["rewards/rejected"], [-0.25])
    close(loss.values, [math.log1p(math.exp(-2.0625))])
    assert not loss.metrics["mask/chosen"].requires_grad


def one(logratios: list[float], kls: list[float], **activations: list[list[float]]) -> Completions:
    return Completions(
        logps=tensor(logratios),
        lengths=torch.tensor([len(logratios)]),
        reference_logps=torch.zeros(len(logratios), dtype=torch.float64),
        more={"forward_kl": tensor(kls), **{f"reference_{kind}": tensor(values) for kind, values in activations.items()}},
    )


def test_rescaled_by_hand() -> None:
    """Completions of 3, 1 and 2 tokens; the second and third tell no tokens apart."""
    lengths = torch.tensor([3, 1, 2])
    values = tensor([-1, 3, 0, 7, 5, 5])
    close(rescaled(values, lengths), [0, 1, 0.25, 1, 1, 1])
    close(rescaled(torch.stack([values, -values], 1), lengths)[:, 1], [1, 0, 0.75, 1, 1, 1])
    varied = tensor([-1, 3, 0, 7, 5, 4]).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rescaled(x, lengths), varied)


def test_asks_for_what_it_is_set_to() -> None:
    assert list(MAPO.want(MaPOConfig(activations=("residual",)))) == ["forward_kl", Activations(of="residual")]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"activations": ["mlps"]}, "'mlp', 'attention', 'residual' or 'logits'"),
        ({"activations": "mlp"}, "activations = 'mlp': Input should be a list, as in [a, b]"),
        ({"activations": []}, "at least 1 item"),
        ({"beta": 0}, "beta = 0: Input should be greater than 0"),
    ],
)
def test_refusals(values: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(MaPOConfig, values, "objective")
    assert message in str(error.value) and "\n" not in str(error.value)
