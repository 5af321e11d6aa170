"""What an objective carries from step to step: in the context, over all micro-batches and processes, and in checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest
import torch
from transformers import TrainerState

from posttrain.context import Context
from posttrain.stats import Rowwise, bound


class Alone:
    """One process."""

    @staticmethod
    def reduce(values: torch.Tensor, kind: str) -> torch.Tensor:
        assert kind == "sum"
        return values


def _after(context: Mapping[str, float], means: Mapping[str, float]) -> dict[str, float]:
    return {"total": context["total"] + means["loss"], "at": context["progress"]} if context else {"total": 1.0}


def finish(context: Context, state: TrainerState, *batches: list[float]) -> None:
    """One optimizer step of these micro-batches."""
    for values in batches:
        context.remember({"loss": torch.tensor(values)})
    state.global_step += 1
    context.on_step_end(None, state, None)


def test_a_state_follows_the_means_of_each_step() -> None:
    """1 at first; the steps' means are 2 = (1 + 2 + 3) / 3 and 6, whatever the micro-batches."""
    context, state = Context(Alone, _after), TrainerState(max_steps=4)
    assert context.scalars(state) == {"progress": 0.0, "total": 1.0}
    finish(context, state, [1.0], [2.0, 3.0])
    assert context.scalars(state) == {"progress": 0.25, "total": 3.0, "at": 0.25, "loss": 2.0}
    finish(context, state, [6.0])
    assert context.scalars(state) == {"progress": 0.5, "total": 9.0, "at": 0.5, "loss": 3.0}


def test_a_checkpoint_holds_it(tmp_path) -> None:
    context, state = Context(Alone, _after), TrainerState(max_steps=4)
    finish(context, state, [0.1])
    state.save_to_json(str(tmp_path / "state.json"))
    assert "posttrain.state" in json.loads((tmp_path / "state.json").read_text())["stateful_callbacks"]
    resumed, again = Context(Alone, _after), TrainerState.load_from_json(str(tmp_path / "state.json"))
    for one, its in ((context, state), (resumed, again)):
        finish(one, its, [0.7])
    assert resumed.scalars(again) == context.scalars(state)


def test_a_statistic_takes_scalars_of_the_context() -> None:
    entry = Rowwise(name="scaled", f=lambda lp, lq, tokens, *, t: t * lp.sum(-1), given=("t",))
    plain, got = bound(["entropy", entry], {"t": torch.tensor(3.0), "other": torch.tensor(0.0)})
    assert plain == "entropy" and got.given == ()
    assert got.f(torch.ones(2, 5), None, None).tolist() == [15.0, 15.0]
    with pytest.raises(KeyError):
        bound([entry], {})
