"""Trees in rows: what the collator lays down, how it packs, and that a packed model sees what separate forwards see."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny_models import MODELS, SHARING, VOCABULARY, WINDOW, WINDOWED, tiny
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from transformers import AutoModelForCausalLM, GPTNeoConfig, Llama4TextConfig, LlamaConfig, PreTrainedModel, Qwen3NextConfig

from posttrain import trees
from posttrain.models import load_model
from posttrain.settings import ModelConfig
from posttrain.trees import Layout, Row, TreeCollator, attention, attention_scale, pack, padding, row_multiple, shareable

ROLES = ("chosen", "rejected")
EXACT = 2e-6  # float32 rounding of log-probs of a few nats
ONE_ROW, SEVERAL_ROWS = 1e9, 30.0  # attention scales that pack ROWS into one row and into three with padding


def row(prompt: int, chosen: list[int], rejected: list[int], seed: int) -> Row:
    """A row of random ids: tokens of the prompt and of each completion of the two roles."""
    draw = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(count)]

    return {"prompt": ids(prompt), "chosen": [ids(n) for n in chosen], "rejected": [ids(n) for n in rejected]}


ROWS = [
    row(20, [9], [14, 1], seed=1),
    row(1, [1], [1], seed=2),
    row(12, [22], [3], seed=3),
    row(30, [2, 17, 2], [], seed=4),
]
"""Branches of unequal length, of length 1, and three to a tree; trees longer than several windows of 8."""


def log_probs(model: PreTrainedModel, layout: Layout, scale: float = ONE_ROW, **changed: Any) -> torch.Tensor:
    """[N] log-prob of every completion token of ROWS under a layout; `changed` replaces arguments of the forward."""
    batch = TreeCollator(ROLES, layout=layout, attention_scale=scale)(ROWS)
    seen = attention(model.config, batch["tree"], batch["branch"], batch["position_ids"], layout) | changed
    logits = model(input_ids=batch["input_ids"], use_cache=False, **seen).logits.flatten(0, 1)[batch["gather"]]
    return logits.float().log_softmax(-1).gather(1, batch["targets"][:, None])[:, 0]


def plain_log_probs(model: PreTrainedModel) -> torch.Tensor:
    """[N] the same from one unpadded forward per completion, in the order of the contract."""
    parts = []
    for role in ROLES:
        for one in ROWS:
            for completion in one[role]:
                logits = model(input_ids=torch.tensor([one["prompt"] + completion]), use_cache=False).logits[0]
                predicting = logits[len(one["prompt"]) - 1 : -1].float().log_softmax(-1)
                parts.append(predicting.gather(1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(parts)


@pytest.mark.parametrize("layout", ["tree", "separate"])
def test_a_completion_without_tokens_has_its_place_and_nothing_else(layout: Layout) -> None:
    """Beside others of its prompt, alone with its prompt, and in a batch of its own."""
    empty = [
        {**ROWS[0], "rejected": [[], *ROWS[0]["rejected"], []]},
        {"prompt": [5, 6], "chosen": [[]], "rejected": []},
        *ROWS[1:],
    ]
    got, expected = (TreeCollator(ROLES, layout=layout)(rows) for rows in (empty, ROWS))
    assert got["lengths.chosen"].tolist() == [9, 0, *expected["lengths.chosen"][1:].tolist()]
    assert got["lengths.rejected"].tolist() == [0, 14, 1, 0, *expected["lengths.rejected"][2:].tolist()]
    assert all(torch.equal(got[name], expected[name]) for name in expected if not name.startswith("lengths"))
    alone = TreeCollator(ROLES, layout=layout)(empty[1:2])
    assert alone["lengths.chosen"].tolist() == [0] and alone["tree"].tolist() == [[1]] and not len(alone["targets"])


# The model sees in a tree what it sees in separate sequences


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", SHARING)
@torch.no_grad()
def test_tree_equals_plain_forwards(name: str, implementation: str) -> None:
    model = tiny(name, implementation)
    truth = plain_log_probs(model)
    assert shareable(model) is None
    assert (log_probs(model, "tree", ONE_ROW) - truth).abs().max() < EXACT
    assert (log_probs(model, "tree", SEVERAL_ROWS) - truth).abs().max() < EXACT
    assert (log_probs(model, "separate") - truth).abs().max() < EXACT


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_gradients_of_tree_equal_those_of_plain_forwards(name: str) -> None:
    model = tiny(name, "eager")
    weights = torch.randn(len(log_probs(model, "tree")), generator=torch.Generator().manual_seed(0))
    gradients = []
    for compute in (plain_log_probs(model), log_probs(model, "tree"), log_probs(model, "separate")):
        parameters = dict(model.named_parameters())
        gradients.append(torch.autograd.grad((weights * compute).sum(), list(parameters.values())))
    for parameter, truth, tree, separate in zip(parameters, *gradients, strict=True):
        for found in (tree, separate):
            error = (found - truth).norm() / (truth.norm() + 1e-6)
            assert error < 1e-5, (parameter, error)


@pytest.mark.parametrize("name", WINDOWED)
@torch.no_grad()
def test_a_forgotten_window_shows(name: str) -> None:
    model = tiny(name, "sdpa")
    truth = plain_log_probs(model)
    batch = TreeCollator(ROLES, attention_scale=ONE_ROW)(ROWS)
    ids = batch["tree"], batch["branch"], batch["position_ids"]
    windowless = type(model.config)(**{**model.config.to_dict(), "sliding_window": 10**6})
    wrong = attention(windowless, *ids, "tree")
    assert (log_probs(model, "tree", attention_mask=wrong["attention_mask"]) - truth).abs().max() > 0.05
    # Counting row indices instead of positions is wrong too.
    places = torch.arange(batch["tree"].shape[1]).expand_as(batch["tree"])
    indices = attention(model.config, batch["tree"], batch["branch"], places, "tree")
    assert (log_probs(model, "tree", attention_mask=indices["attention_mask"]) - truth).abs().max() > 0.05


@torch.no_grad()
def test_forgotten_positions_and_branches_show() -> None:
    model = tiny("llama", "sdpa")
    truth = plain_log_probs(model)
    batch = TreeCollator(ROLES, attention_scale=ONE_ROW)(ROWS)
    one_branch = attention(model.config, batch["tree"], 0 * batch["branch"], batch["position_ids"], "tree")
    assert (log_probs(model, "tree", attention_mask=one_branch["attention_mask"]) - truth).abs().max() > 0.01
    assert (log_probs(model, "tree", position_ids=None) - truth).abs().max() > 0.01


@torch.no_grad()
def test_recurrent_model_is_exact_in_the_separate_layout() -> None:
    model = tiny("mamba")
    assert (log_probs(model, "separate") - plain_log_probs(model)).abs().max() < EXACT


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_padding_makes_no_nan(implementation: str, dtype: torch.dtype) -> None:
    model = tiny("gemma3", implementation, dtype)
    batch = TreeCollator(ROLES, attention_scale=SEVERAL_ROWS)(ROWS)
    assert padding(batch) > 0
    seen = attention(model.config, batch["tree"], batch["branch"], batch["position_ids"], "tree")
    assert model(input_ids=batch["input_ids"], use_cache=False, **seen).logits.isfinite().all()


# Masks


def test_mask_of_a_small_row() -> None:
    tree = torch.tensor([[1, 1, 1, 1, 2, 2, 0]])
    branch = torch.tensor([[0, 0, 1, 2, 0, 1, 0]])
    position = torch.tensor([[0, 1, 2, 2, 0, 1, 0]])
    config = LlamaConfig(attn_implementation="sdpa")
    mask = attention(config, tree, branch, position, "tree")["attention_mask"]
    expected = [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]
    assert mask.dtype == torch.bool
    assert mask.int().tolist() == [[expected]]
    config.sliding_window = 2  # all layers slide: Mistral's form
    near = attention(config, tree, branch, position, "tree")["attention_mask"]
    assert near[0, 0, 2].int().tolist() == [0, 1, 1, 0, 0, 0, 0]
    assert near[0, 0, 3].int().tolist() == [0, 1, 0, 1, 0, 0, 0]  # two places after its parent, one position


def test_form_of_the_mask_follows_the_configuration() -> None:
    batch = TreeCollator(ROLES)(ROWS)
    ids = batch["tree"], batch["branch"], batch["position_ids"]
    for name, kinds in {"qwen2": {"full_attention"}, "gemma2": {"full_attention", "sliding_attention"}}.items():
        mask = attention(tiny(name, "sdpa").config, *ids, "tree")["attention_mask"]
        assert set(mask) == kinds
    additive = attention(tiny("llama", "eager", torch.bfloat16).config, *ids, "tree")["attention_mask"]
    boolean = attention(tiny("llama", "sdpa").config, *ids, "tree")["attention_mask"]
    assert additive.dtype == torch.bfloat16
    assert torch.equal(additive == 0, boolean)
    assert additive[~boolean].unique().tolist() == [torch.finfo(torch.bfloat16).min]
    separate = attention(tiny("gemma2", "sdpa").config, *ids, "separate")
    assert list(separate) == ["attention_mask"]
    assert torch.equal(separate["attention_mask"], (batch["tree"] > 0).long())


@pytest.mark.parametrize("window", [None, WINDOW])
def test_block_mask_is_the_dense_mask(window: int | None) -> None:
    batch = TreeCollator(ROLES, attention_scale=SEVERAL_ROWS)(ROWS)
    ids = batch["tree"], batch["branch"], batch["position_ids"]
    block = attention(LlamaConfig(attn_implementation="flex_attention", sliding_window=window), *ids, "tree")["attention_mask"]
    dense = attention(LlamaConfig(attn_implementation="sdpa", sliding_window=window), *ids, "tree")["attention_mask"]
    rows, width = batch["tree"].shape
    assert torch.equal(create_mask(block.mask_mod, rows, 1, width, width, device="cpu"), dense)


def test_models_share_the_block_mask_of_a_batch() -> None:
    config = LlamaConfig(attn_implementation="flex_attention")
    batch = TreeCollator(ROLES, attention_scale=SEVERAL_ROWS)(ROWS)
    ids = batch["tree"], batch["branch"], batch["position_ids"]
    with torch.inference_mode():
        one = attention(config, *ids, "tree")["attention_mask"]
    again = attention(config, *ids, "tree")["attention_mask"]
    assert one is again and not one.kv_indices.is_inference()
    assert attention(config, ids[0], 0 * ids[1], ids[2], "tree")["attention_mask"] is not one
    before = len(trees._block_masks)
    del batch, ids, one, again
    assert len(trees._block_masks) == before - 1


def test_making_block_masks_is_compiled_once_for_all_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on a GPU, with a compiler that leaves the operations as they are: for one row and for several, whatever T."""
    compiled, graphs = torch.compile(create_block_mask, dynamic=True, backend="eager"), torch._dynamo.utils.counters["stats"]
    config, before = LlamaConfig(attn_implementation="flex_attention"), graphs["unique_graphs"]
    for rows, width in ((1, 150), (1, 300), (2, 384), (3, 640), (1, 512)):
        tree, branch = torch.ones(rows, width, dtype=torch.int64), torch.arange(width).expand(rows, width) // 100
        masks = []
        for maker in (compiled, create_block_mask):
            monkeypatch.setattr(trees, "_maker", lambda device, maker=maker: maker)
            masks.append(attention(config, tree.clone(), branch, branch, "tree")["attention_mask"].to_dense())
        assert torch.equal(*masks)
    assert graphs["unique_graphs"] - before <= 2


def test_rows_for_flex_attention_are_long_and_whole_blocks() -> None:
    config = LlamaConfig(attn_implementation="flex_attention")
    assert pack([5, 900, 7, 800], attention_scale(config)) == [[0, 1, 2, 3]]
    assert row_multiple(config) == 128
    assert row_multiple(LlamaConfig(attn_implementation="sdpa")) == (8 if torch.cuda.is_available() else 1)


@torch.no_grad()
def test_flex_attention_equals_plain_forwards() -> None:
    with torch.compiler.set_stance("force_eager"):
        model, twin = tiny("qwen2_sliding", "flex_attention"), tiny("qwen2_sliding", "sdpa")
        assert shareable(model) is None
        assert (log_probs(model, "tree", SEVERAL_ROWS) - plain_log_probs(twin)).abs().max() < EXACT


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flex_attention has gradients on GPUs only")
def test_flex_attention_on_a_gpu() -> None:
    """Compiled, with gradients, for rows of several shapes: as sdpa with the dense mask."""
    shape = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
    }
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape)).cuda()
    for count in (1, 2, 4):
        found = []
        for implementation in ("sdpa", "flex_attention"):
            model.set_attn_implementation(implementation)
            batch = {name: tensor.cuda() for name, tensor in TreeCollator(ROLES, attention_scale=ONE_ROW)(ROWS[:count]).items()}
            seen = attention(model.config, batch["tree"], batch["branch"], batch["position_ids"], "tree")
            logits = model(input_ids=batch["input_ids"], use_cache=False, **seen).logits.flatten(0, 1)[batch["gather"]]
            logps = logits.log_softmax(-1).gather(1, batch["targets"][:, None])
            gradients = torch.autograd.grad(logps.sum(), list(model.parameters()))
            found.append([logps.detach(), *gradients])
        for ours, truth in zip(*found, strict=True):
            assert (ours - truth).norm() <= 1e-3 * truth.norm()


@pytest.mark.parametrize("there", [True, False])
def test_sdpa_takes_the_place_of_flex_attention_without_a_gpu(there: bool, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("llama").save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    loaded = load_model(ModelConfig(name=str(tmp_path), attention="flex_attention", dtype="float32"))
    assert loaded.config._attn_implementation == ("flex_attention" if there else "sdpa")


# Who can share


def test_reasons_not_to_share() -> None:
    assert shareable(tiny("mamba")) == "its layers carry a recurrent state along the row"
    size = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    chunked = Llama4TextConfig(**size, intermediate_size=16, intermediate_size_mlp=16, num_local_experts=2, head_dim=8)
    linear = Qwen3NextConfig(**size, num_experts=2, layer_types=["linear_attention", "full_attention"])
    local = GPTNeoConfig(vocab_size=11, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]])
    assert "chunked_attention" in of_config(chunked)
    assert of_config(linear) is not None
    assert of_config(local) == "its local attention counts row indices, not positions"
    flash = tiny("llama", "sdpa")
    flash.config._attn_implementation = "flash_attention_2"
    assert "flash_attention_2 ignores" in shareable(flash)


def of_config(config: Any) -> str | None:
    with torch.device("meta"):
        return shareable(AutoModelForCausalLM.from_config(config))


def test_adapters_share_unless_they_add_tokens() -> None:
    assert shareable(get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))) is None
    prompt = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    assert "virtual tokens" in shareable(get_peft_model(tiny("llama"), prompt))


# What the collator lays down


def test_batch_of_a_small_example() -> None:
    rows = [
        {"prompt": [10, 11, 12], "chosen": [[20, 21]], "rejected": [[30, 31, 32]], "label": 1, "weight": 0.5},
        {"prompt": [13], "chosen": [[22]], "rejected": [[33, 34]], "label": 0, "weight": 2.0},
    ]
    batch = TreeCollator(ROLES, columns=("label", "weight"))(rows)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[10, 11, 12, 20, 30, 31, 13, 33]],
        "position_ids": [[0, 1, 2, 3, 3, 4, 0, 1]],
        "tree": [[1, 1, 1, 1, 1, 1, 2, 2]],
        "branch": [[0, 0, 0, 1, 2, 2, 0, 2]],
        "gather": [2, 3, 6, 2, 4, 5, 6, 7],
        "targets": [20, 21, 22, 30, 31, 32, 33, 34],
        "lengths.chosen": [2, 1],
        "lengths.rejected": [3, 2],
        "row.label": [1, 0],
        "row.weight": [0.5, 2.0],
    }
    assert {tensor.dtype for name, tensor in batch.items() if name != "row.weight"} == {torch.int64}
    assert batch["row.weight"].dtype == torch.float32


def test_separate_batch_of_a_small_example() -> None:
    rows = [
        {"prompt": [10, 11], "chosen": [[20, 21]], "rejected": [[30]]},
        {"prompt": [13], "chosen": [[22]], "rejected": [[33, 34]]},
    ]
    batch = TreeCollator(ROLES, layout="separate", multiple=4)(rows)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[10, 11, 20, 0], [13, 0, 0, 0], [10, 11, 0, 0], [13, 33, 0, 0]],
        "position_ids": [[0, 1, 2, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]],
        "tree": [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]],
        "branch": [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]],
        "gather": [1, 2, 4, 9, 12, 13],
        "targets": [20, 21, 22, 30, 33, 34],
        "lengths.chosen": [2, 1],
        "lengths.rejected": [1, 2],
    }
    assert padding(batch) == 8


@pytest.mark.parametrize("layout", ["tree", "separate"])
def test_reference_follows_the_order_of_the_targets(layout: Layout) -> None:
    def lookup(prompt: list[int], completion: list[int]) -> dict[str, np.ndarray]:
        logps = np.array([-(prompt[0] + token / 1000) for token in completion], dtype=np.float32)
        return {"reference_logps": logps, "top_ids": np.array([[token, prompt[0]] for token in completion])}

    batch = TreeCollator(ROLES, layout=layout, reference=lookup)(ROWS)
    owners = [one["prompt"][0] for role in ROLES for one in ROWS for completion in one[role] for _ in completion]
    assert batch["reference_logps"].dtype == torch.float32
    assert torch.equal(batch["reference_logps"], -(torch.tensor(owners) + batch["targets"] / 1000))
    assert torch.equal(batch["top_ids"], torch.stack([batch["targets"], torch.tensor(owners)], 1))


def test_an_empty_prompt_is_our_mistake_and_so_is_a_completion_to_score() -> None:
    for whole, wrong in ((False, {"prompt": [], "chosen": [[4]]}), (True, {"prompt": [4], "chosen": [[]]})):
        with pytest.raises(AssertionError, match="empty"):
            TreeCollator(["chosen"], whole=whole)([wrong])
    with pytest.raises(AssertionError, match="another length"):
        short = TreeCollator(("chosen",), reference=lambda prompt, ids: {"top_ids": np.zeros((1, 2))})
        short([{"prompt": [4], "chosen": [[5, 6]]}])


# Packing


def test_pack_weighs_padding_against_attention() -> None:
    assert pack([4, 4, 4, 4], scale=1e9) == [[0], [1], [2], [3]]  # nothing to pad, so the shortest rows
    assert pack([5, 4, 3], scale=1e9) == [[0, 1, 2]]  # 12 places, 14 in two rows, 15 in three
    assert pack([5, 4, 3], scale=5.0) == [[0], [1], [2]]  # 15 * 2 < 14 * 2.4 < 12 * 3.4
    assert pack([9, 5, 4], scale=10.0) == [[0], [1, 2]]  # 2 * 9 * 1.9 < 1 * 18 * 2.8 and < 3 * 9 * 1.9
    assert pack([9, 1], scale=1.0) == [[0, 1]]  # 1 * 10 * 11 < 2 * 9 * 10


@given(st.lists(st.integers(1, 400), min_size=1, max_size=20), st.floats(1.0, 1e6))
@settings(deadline=None, max_examples=200)
def test_pack_loses_nothing_and_costs_no_more_than_its_neighbours(sizes: list[int], scale: float) -> None:
    def cost(loads: list[int]) -> float:
        return len(loads) * max(loads) * (1 + max(loads) / scale)

    rows = pack(sizes, scale)
    loads = [sum(sizes[number] for number in members) for members in rows]
    assert sorted(number for members in rows for number in members) == list(range(len(sizes)))
    assert all(rows)
    assert rows == pack(sizes, scale)
    assert cost(loads) <= min(cost([sum(sizes)]), cost(sizes)) * (1 + 1e-12)
    # Each tree went to the shortest row: no row exceeds the mean by more than one tree (Graham's bound).
    assert max(loads) <= sum(sizes) / len(rows) + (1 - 1 / len(rows)) * max(sizes) + 1e-9


_completions = st.lists(st.lists(st.integers(3, 90), min_size=1, max_size=7), min_size=1, max_size=3)
_rows = st.lists(
    st.fixed_dictionaries(
        {"prompt": st.lists(st.integers(3, 90), min_size=1, max_size=7), "chosen": _completions, "rejected": _completions}
    ),
    min_size=1,
    max_size=6,
)


@given(_rows, st.sampled_from([1.0, 20.0, 1e9]), st.sampled_from(["tree", "separate"]), st.sampled_from([1, 8]))
@settings(deadline=None, max_examples=150)
def test_every_token_is_predicted_from_its_own_past(rows: list[Row], scale: float, layout: Layout, multiple: int) -> None:
    batch = TreeCollator(ROLES, layout=layout, attention_scale=scale, multiple=multiple)(rows)
    shape = batch["input_ids"].shape
    assert shape[1] % multiple == 0
    mask = attention(
        LlamaConfig(attn_implementation="sdpa"), *(batch[key] for key in ("tree", "branch", "position_ids")), "tree"
    )
    visible = mask["attention_mask"][:, 0].flatten(0, 1)  # [R * T, T]
    expected = [
        (one["prompt"] + completion[:place], target)
        for role in ROLES
        for one in rows
        for completion in one[role]
        for place, target in enumerate(completion)
    ]
    assert len(batch["gather"]) == len(batch["targets"]) == len(expected)
    for (past, target), place, found in zip(expected, batch["gather"].tolist(), batch["targets"].tolist(), strict=True):
        seen = visible[place]
        assert found == target
        assert batch["input_ids"][place // shape[1]][seen].tolist() == past
        assert batch["position_ids"][place // shape[1]][seen].tolist() == list(range(len(past)))
    assert (batch["tree"] > 0).sum() + padding(batch) == shape[0] * shape[1]


@torch.no_grad()
def test_order_of_rows_only_permutes() -> None:
    model = tiny("qwen3", "sdpa")

    def sums(rows: list[Row]) -> torch.Tensor:
        batch = TreeCollator(("chosen",), attention_scale=SEVERAL_ROWS)(rows)
        seen = attention(model.config, batch["tree"], batch["branch"], batch["position_ids"], "tree")
        logits = model(input_ids=batch["input_ids"], use_cache=False, **seen).logits.flatten(0, 1)[batch["gather"]]
        logps = logits.log_softmax(-1).gather(1, batch["targets"][:, None])[:, 0]
        return torch.stack([part.sum() for part in logps.split(batch["lengths.chosen"].tolist())])

    rows = [{"prompt": one["prompt"], "chosen": one["chosen"][:1]} for one in ROWS]
    assert torch.allclose(sums(rows), sums(rows[::-1]).flip(0), rtol=0, atol=1e-5)


def test_attention_scale_of_known_models() -> None:
    # hidden 2048, intermediate 8192: (4 * 2048 + 3 * 8192) / 2 = 16384, at 0.6 of the rate
    assert attention_scale(LlamaConfig(hidden_size=2048, intermediate_size=8192)) == pytest.approx(0.6 * 16384)
    for name in MODELS:
        assert 50 < attention_scale(tiny(name).config) < 200
