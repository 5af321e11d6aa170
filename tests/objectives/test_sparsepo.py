"""SparsePO against the authors' network and numbers worked by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from golden import Golden, close, golden, tensor
from random_statistics import own_of, random_statistics

from posttrain.learned import Own
from posttrain.objectives.preference.sparsepo import SparsePOConfig, sparsepo
from posttrain.recipe import load_run
from posttrain.references import kind_of
from posttrain.registry import find
from posttrain.schema import UserError, parse
from posttrain.stats import Completions, Pairs

SPARSEPO = find("sparsepo")


def network(own: Own, name: str, values: dict[str, list]) -> None:
    """Give one network the authors' parameters, which they keep a layer at a time."""
    layers = range(sum(key.endswith("w.bias") for key in values))
    stacked = {
        "w": torch.cat([tensor(values[f"w_per_layer.{layer}.w.weight"]) for layer in layers]),
        "c": torch.cat([tensor(values[f"w_per_layer.{layer}.w.bias"]) for layer in layers]),
        "v": tensor(values["mixer.weight"])[0],
        "scale": tensor(values["layer_norm.weight"]),
        "shift": tensor(values["layer_norm.bias"]),
    }
    for key, value in stacked.items():
        own.register_parameter(f"{name}_{key}", torch.nn.Parameter(value))


def masked(official: Golden, own: Own) -> Pairs:
    """The statistics of a golden file with the masks that its networks make of its hidden states."""
    hidden = tensor(official.inputs["ref_hidden_states"])[1:]  # [L, 2B, S, H]; the first are embeddings
    states = hidden[:, :, :-1].permute(1, 2, 0, 3)  # [2B, S - 1, L, H]
    pairs, half = official.pairs(("forward_kl",)), len(states) // 2

    def one(completions: Completions, part: slice) -> Completions:
        given = {"logp": completions.logps, "reference_states": states[part][official.mask[part]]}
        return dataclasses.replace(completions, more={**completions.more, **own(given, completions.lengths)})

    return Pairs(chosen=one(pairs.chosen, slice(half)), rejected=one(pairs.rejected, slice(half, None)))


@pytest.mark.parametrize(("name", "masks"), [("sparsepo_common_l1", "common"), ("sparsepo_independent", "independent")])
def test_authors_network(name: str, masks: str) -> None:
    """In value, and in gradient to the policy and to the parameters of the networks."""
    official = golden(name)
    inputs = official.inputs
    l1 = {"l1_reward": inputs["l1_norm_param_u"], "l1_kl": inputs["l1_norm_param_d"]}
    config = SparsePOConfig(beta=inputs["beta"], masks=masks, **l1)
    own = Own(SPARSEPO.learned, config, {})
    sources = {"mask": "u"} if masks == "common" else {"mask_reward": "u", "mask_kl": "d"}
    for ours, theirs in sources.items():
        network(own, ours, inputs[f"mask_{theirs}_params"])
    pairs = masked(official, own)
    for ours, theirs in sources.items():
        both = torch.cat([pairs.chosen[ours], pairs.rejected[ours]])
        close(both, tensor(official.outputs[f"mask_{theirs}"])[official.mask].tolist())
    loss = official.agree(SPARSEPO, config, statistics=pairs)
    kl = torch.cat([loss.metrics["kl/chosen"], loss.metrics["kl/rejected"]])
    close(kl, official.outputs["masked_kl"])
    reward = torch.cat([loss.metrics["rewards/chosen"], loss.metrics["rewards/rejected"]])
    close(reward / config.beta - kl, official.outputs["masked_u"])
    loss = sparsepo(config, masked(official, own))
    loss.values.mean().backward()
    for ours, theirs in sources.items():
        expected = Own(SPARSEPO.learned, config, {})
        network(expected, ours, official.outputs[f"grad_mask_{theirs}"])
        for key, value in expected.named_parameters():
            close(vars(own)["_parameters"][key].grad, value.tolist())


def test_mask_by_hand() -> None:
    """Two layers of width 2, one token; LayerNorm of (3, 1) is (1, -1) / sqrt(1 + eps), of (0, 4) its negative.

    Layer 1: w (1, 0), c 0.5 -> relu(1.5) = 1.5. Layer 2: w (0, 1), c -0.25 -> relu(1 - 0.25) = 0.75.
    v = (0.2, 0.4): 0.3 + 0.3 = 0.6; v = (0.2, -0.6): 0.3 - 0.45 < 0, so the mask is 0.
    """
    states = tensor([[[3, 1], [0, 4]]])
    for v, expected in (([0.2, 0.4], 0.6), ([0.2, -0.6], 0.0)):
        parameters = {"w": [[1, 0], [0, 1]], "c": [0.5, -0.25], "v": v, "scale": [1, 1], "shift": [0, 0]}
        own = Own(SPARSEPO.learned, SparsePOConfig(), {f"mask_{key}": tensor(value) for key, value in parameters.items()})
        mask = own({"logp": tensor([0.0]), "reference_states": states}, torch.tensor([1]))["mask"]
        close(mask, [expected], 1e-5)


@pytest.mark.parametrize(
    ("activation", "expected"), [("resc", [0, 0.75, 1, 1]), ("none", [-2, 4, 6, 5]), ("relu", [0, 4, 6, 5])]
)
def test_mixer_activations_by_hand(activation: str, expected: list[float]) -> None:
    """One layer that scores the tokens of a completion -2, 4 and 6, that of another 5."""
    config = SparsePOConfig(layer_activation="none", mixer_activation=activation)
    scores = tensor([-2, 4, 6, 5])
    parameters = {"w": [[0, 0]], "c": scores[:, None].tolist(), "v": [1], "scale": [1, 1], "shift": [0, 0]}
    tokens = Completions(logps=scores, lengths=torch.tensor([3, 1]), more={"reference_states": tensor([[[1, -1]]] * 4)})
    mask = SPARSEPO.learned.statistics(config, {f"mask_{key}": tensor(value) for key, value in parameters.items()}, tokens)
    close(mask["mask"], expected)


def pairs(**masks: tuple[list[float], list[float]]) -> Pairs:
    """One pair of two-token completions: log-ratios (1, 2) and (-1, 1), forward KLs (0.5, 0.25) and (1, 0.5)."""

    def one(logratios: list[float], kls: list[float], side: int) -> Completions:
        more = {"forward_kl": tensor(kls), **{name: tensor(both[side]) for name, both in masks.items()}}
        zeros = torch.zeros(2, dtype=torch.float64)
        return Completions(logps=tensor(logratios), lengths=torch.tensor([2]), reference_logps=zeros, more=more)

    return Pairs(chosen=one([1, 2], [0.5, 0.25], 0), rejected=one([-1, 1], [1, 0.5], 1))


def test_by_hand() -> None:
    """beta 0.5, mask (0.5, 0) on chosen and (1, 2) on rejected.

    U: 0.5 and 1; Q: 0.25 and 2; rewards 0.375 and 1.5. L1 0.5 + 3, weighed by (0.2 + 0.4) / 2.
    """
    batch = pairs(mask=([0.5, 0], [1, 2]))
    loss = sparsepo(SparsePOConfig(beta=0.5, l1_reward=0.2, l1_kl=0.4), batch)
    close(loss.metrics["rewards/chosen"], [0.375])
    close(loss.metrics["rewards/rejected"], [1.5])
    close(loss.values, [math.log1p(math.exp(1.125)) + 0.3 * 3.5])
    close(loss.metrics["mask/zero/chosen"], [0, 1])
    close(loss.metrics["mask/l1/rejected"], [3])
    close(loss.metrics["mask/max"], [0.5, 0, 1, 2])


def test_independent_and_single_masks_by_hand() -> None:
    """On rewards (1, 0) and (0, 1), on KLs (0, 2) and (1, 0): U 1 and 1, Q 0.5 and 1; unmasked Q 0.75 and 1.5, U 3 and 0."""
    on_reward, on_kl = ([1, 0], [0, 1]), ([0, 2], [1, 0])
    l1 = {"l1_reward": 0.1, "l1_kl": 0.01}
    both = sparsepo(SparsePOConfig(beta=1, masks="independent", **l1), pairs(mask_reward=on_reward, mask_kl=on_kl))
    close(both.values, [math.log1p(math.exp(2 - 1.5)) + 0.1 * 2 + 0.01 * 3])
    rewards = sparsepo(SparsePOConfig(beta=1, mask_on_kl=False), pairs(mask_reward=on_reward))
    close(rewards.values, [math.log1p(math.exp(2.5 - 1.75))])
    kls = sparsepo(SparsePOConfig(beta=1, mask_on_reward=False), pairs(mask_kl=on_kl))
    close(kls.values, [math.log1p(math.exp(1 - 3.5))])


def test_all_ones_is_tdpo1() -> None:
    ones = pairs(mask=([1, 1], [1, 1]))
    tdpo = find("tdpo")
    expected = tdpo(tdpo.config(beta=0.3, version=1), ones)
    close(sparsepo(SparsePOConfig(beta=0.3), ones).values, expected.values.tolist())


@pytest.mark.parametrize("masks", ["common", "independent"])
def test_gradcheck_through_the_networks(masks: str) -> None:
    config = SparsePOConfig(masks=masks, l1_reward=0.1, l1_kl=0.2)
    own = own_of(SPARSEPO, config)
    names = [name for name, _ in own.named_parameters()]
    plain = random_statistics(Pairs, rows=2, want=SPARSEPO.want(config))

    def values(*parameters: torch.Tensor) -> torch.Tensor:
        def one(tokens: Completions) -> Completions:
            found = SPARSEPO.learned.statistics(config, dict(zip(names, parameters, strict=True)), tokens)
            return dataclasses.replace(tokens, more={**tokens.more, **found})

        return sparsepo(config, Pairs(chosen=one(plain.chosen), rejected=one(plain.rejected))).values

    assert torch.autograd.gradcheck(values, tuple(own.parameters()))


def test_at_the_reference_only_l1_moves_the_masks() -> None:
    """U = Q = 0 there, so the loss is log 2 whatever the masks, and their gradient is that of the L1 norms alone."""
    for weight in (0.0, 0.1):
        config = SparsePOConfig(l1_reward=weight)
        mask = tensor([0.5, 0.2]).requires_grad_()
        zeros = torch.zeros(2, dtype=torch.float64)
        same = Completions(
            logps=zeros, lengths=torch.tensor([2]), reference_logps=zeros, more={"forward_kl": zeros, "mask": mask}
        )
        loss = sparsepo(config, Pairs(chosen=same, rejected=same))
        assert SPARSEPO.start(config) == (math.log(2) if not weight else None)
        close(loss.values, [math.log(2) + 2 * weight / 2 * 0.7])
        (gradient,) = torch.autograd.grad(loss.values.sum(), mask)
        close(gradient, [weight, weight])


def test_a_dead_mask_is_reported() -> None:
    said = SPARSEPO.watch(
        SparsePOConfig(masks="independent"), {"mask_reward/min": 0.0, "mask_reward/max": 0.0, "mask_kl/max": 1}
    )
    assert len(said) == 1 and said[0].startswith("mask_reward is 0 at every token: it has no gradient")
    assert "train.seed" in said[0] and "l1" in said[0]
    assert SPARSEPO.watch(SparsePOConfig(), {"mask/min": 0.0, "mask/max": 0.01}) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"mask_on_reward": False, "mask_on_kl": False},
            "mask_on_reward and mask_on_kl are both false, which leaves nothing to mask; tdpo has no masks",
        ),
        (
            {"mask_on_kl": False, "l1_kl": 0.1},
            "l1_kl weighs a mask that mask_on_kl = false switches off; leave it out",
        ),
        ({"masks": "both"}, "Input should be 'common' or 'independent'"),
    ],
)
def test_refusals(values: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(SparsePOConfig, values, "objective")
    assert str(error.value).startswith("objective: ") and str(error.value).endswith(message) and "\n" not in str(error.value)


def test_cached_log_probs_are_refused() -> None:
    run = load_run("sparsepo", overrides=["model=policy", "data=pairs.jsonl", "reference=cached"])
    with pytest.raises(UserError, match=r"^reference.kind = 'cached': sparsepo reads the reference over the whole vocabulary"):
        kind_of(run)
