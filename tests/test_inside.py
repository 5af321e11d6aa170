"""What is read inside the layers of a model is what its own forward, one sequence at a time, says of the same tokens."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import SHARING, tiny
from torch import Tensor, nn

from posttrain.inside import refuse_unknown
from posttrain.models import Request, attach
from posttrain.reference import AdapterOff, FrozenModel
from posttrain.schema import UserError
from posttrain.stats import Activations, States
from posttrain.trees import TreeCollator

KINDS = ("mlp", "attention", "residual", "logits")
ROWS = [
    {"prompt": [5, 6, 7], "chosen": [[8, 9]], "rejected": [[10, 11, 12]]},
    {"prompt": [13, 14], "chosen": [[15]], "rejected": [[16, 17]]},
]
WANT = (States(), *(Activations(of=kind) for kind in KINDS))


def read(reference: FrozenModel | AdapterOff, policy: nn.Module, want: tuple = WANT) -> dict[str, Tensor]:
    """What a reference says of the completion tokens of `ROWS`, laid out as trees."""
    batch = TreeCollator(("chosen", "rejected"))(ROWS)
    request = Request(gather=batch["gather"], targets=batch["targets"], want=(), inside=want)
    return reference.heads(policy, batch, "tree", request)[1]


@torch.no_grad()
def own(model: nn.Module) -> tuple[Tensor, Tensor]:
    """[L + 1, N, H] hidden states and [N, V] logits of the same tokens, from plain forwards."""
    states, logits = [], []
    for role in ("chosen", "rejected"):
        for row in ROWS:
            start, ids = len(row["prompt"]) - 1, [*row["prompt"], *row[role][0]]
            out = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
            states.append(torch.stack(out.hidden_states)[:, 0, start:-1])
            logits.append(out.logits[0, start:-1])
    return torch.cat(states, 1), torch.cat(logits)


def frozen(name: str) -> tuple[FrozenModel, nn.Module]:
    """A tiny model as a reference, and the same one without statistics."""
    model = tiny(name, dtype=torch.float64)
    attach(model)
    return FrozenModel(model, name), tiny(name, dtype=torch.float64)


@pytest.mark.parametrize("name", SHARING)
def test_states_are_those_of_the_model(name: str) -> None:
    """After every layer, without the embeddings, the last one normed: of completion tokens only, 8 of them."""
    reference, plain = frozen(name)
    states = read(reference, plain, (States(),))["reference_states"]
    assert states.shape == (8, 2, 32) and not states.requires_grad
    torch.testing.assert_close(states.transpose(0, 1), own(plain)[0][1:], rtol=0, atol=1e-5)
    assert not any(module._forward_hooks for module in reference.model.modules())


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "mistral"])
def test_activations_are_those_of_the_model(name: str) -> None:
    """A layer adds what its attention and its MLP put out; the mean over features is linear."""
    reference, plain = frozen(name)
    told = read(reference, plain)
    states, logits = own(plain)
    mlp, attention, residual, head = (told[f"reference_{kind}"] for kind in KINDS)
    assert mlp.shape == attention.shape == residual.shape == (8, 2) and head.shape == (8, 1)
    before = torch.stack([states[0].mean(-1), residual[:, 0]], 1)
    torch.testing.assert_close(residual[:, 0], states[1].mean(-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(before + attention + mlp, residual, rtol=0, atol=1e-6)
    assert (attention - mlp).abs().min() > 1e-6
    torch.testing.assert_close(head[:, 0], logits.mean(-1), rtol=0, atol=1e-5)


def test_logits_are_those_before_a_soft_cap() -> None:
    reference, plain = frozen("gemma2")
    cap = plain.config.final_logit_softcapping
    uncapped = cap * torch.atanh(own(plain)[1] / cap)
    torch.testing.assert_close(read(reference, plain)["reference_logits"][:, 0], uncapped.mean(-1), rtol=0, atol=1e-5)


def test_the_policy_with_its_adapter_off_is_the_base() -> None:
    reference, plain = frozen("llama")
    torch.manual_seed(0)
    settings = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    policy = get_peft_model(tiny("llama", dtype=torch.float64), settings).to(torch.float64)
    attach(policy)
    expected = read(reference, plain)
    for name, values in read(AdapterOff(), policy).items():
        torch.testing.assert_close(values, expected[name], rtol=0, atol=1e-6)


def test_what_cannot_be_found_is_refused() -> None:
    with pytest.raises(UserError, match=r"^reference: a layer of OPTForCausalLM has no mlp, whose activations are read; its"):
        refuse_unknown(tiny("opt"), (Activations(of="mlp"),))
    refuse_unknown(tiny("opt"), (Activations(of="attention"), States()))
    model = tiny("llama")
    model.config.num_hidden_layers = 3
    with pytest.raises(UserError, match=r"^reference: LlamaForCausalLM has no list of its 3 decoder layers, whose states are"):
        refuse_unknown(model, (States(),))
