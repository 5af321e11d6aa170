"""The same training, reached in different ways, is the same training. For every objective of the package, in float64."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from trajectory import PROBE, STEPS, Trajectory, objective_named, train

from posttrain.reference import reads_vocabulary
from posttrain.registry import names

ROOT = Path(__file__).parent

every_objective = pytest.mark.parametrize("name", [*names(), PROBE.name])

any_split = pytest.mark.parametrize("name", [name for name in (*names(), PROBE.name) if not objective_named(name).coupled])
"""Those whose loss does not depend, by declaration, on how a step is split into micro-batches."""

EXACT = 1e-6
"""Parameters are float64, but transformers adds up the loss it logs, and normalises and rotates, in float32."""

CACHED = 1e-4
"""Cached log-probs are float32."""


def same(one: Trajectory, other: Trajectory, atol: float = EXACT, without: str = "") -> None:
    """Losses, logged metrics (all but `without`) and final parameters agree."""
    assert len(one.losses) == len(other.losses) == STEPS
    assert one.losses == pytest.approx(other.losses, abs=atol, rel=atol)
    for step, (ours, theirs) in enumerate(zip(one.metrics, other.metrics, strict=True)):
        ours, theirs = ({name: value for name, value in side.items() if name != without} for side in (ours, theirs))
        assert ours == pytest.approx(theirs, abs=atol, rel=atol), f"step {step}"
    ours, theirs = ({f: v for f, v in side.evaluated.items() if f != f"eval_{without}"} for side in (one, other))
    assert ours == pytest.approx(theirs, abs=atol, rel=atol)
    torch.testing.assert_close(one.parameters, other.parameters, rtol=0, atol=atol)


@pytest.fixture(scope="session")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trajectory]:
    """The trajectory to compare with: one process, batch 4, tree, chunked, frozen; trained once per objective."""

    @functools.cache
    def run(name: str, peft: bool = False) -> Trajectory:
        return train(name, tmp_path_factory.mktemp(name), peft=peft)

    return run


@every_objective
def test_trains(name: str, usual: Callable[..., Trajectory]) -> None:
    """So that the comparisons below compare something: losses are finite and the parameters move."""
    for peft in (False, True):
        losses = usual(name, peft=peft).losses
        assert all(math.isfinite(loss) for loss in losses)
        assert len(set(losses)) == STEPS


@any_split
@pytest.mark.parametrize(("batch", "accumulation"), [(2, 2), (1, 4)])
def test_accumulation(name: str, batch: int, accumulation: int, usual: Callable[..., Trajectory], tmp_path: Path) -> None:
    same(train(name, tmp_path, batch=batch, accumulation=accumulation), usual(name))


@every_objective
def test_separate_sequences(name: str, usual: Callable[..., Trajectory], tmp_path: Path) -> None:
    same(train(name, tmp_path, layout="separate"), usual(name))


@every_objective
def test_dense_kernel(name: str, usual: Callable[..., Trajectory], tmp_path: Path) -> None:
    same(train(name, tmp_path, impl="dense"), usual(name))


@every_objective
def test_resumed(name: str, tmp_path: Path) -> None:
    """Bitwise: steps 3 and 4 after a checkpoint are those of the run that did not stop."""
    whole = train(name, tmp_path)
    resumed = train(name, tmp_path, resume=True)
    assert resumed.losses == whole.losses
    assert resumed.metrics == whole.metrics
    assert torch.equal(resumed.parameters, whole.parameters)


def reads_reference(name: str) -> bool:
    """Whether an objective reads the reference, with its default settings."""
    objective = objective_named(name)
    return objective.reads_reference(objective.config())


def cacheable(name: str) -> bool:
    """Whether log-probs of the reference are all that an objective reads of it."""
    objective = objective_named(name)
    return reads_reference(name) and not reads_vocabulary(objective, objective.config())


@every_objective
def test_cached_reference(name: str, usual: Callable[..., Trajectory], tmp_path: Path) -> None:
    if not cacheable(name):
        pytest.skip("reads no reference, or all of it")
    same(train(name, tmp_path, reference="cached"), usual(name), CACHED)


@every_objective
def test_reference_of_an_adapter(name: str, usual: Callable[..., Trajectory], tmp_path: Path) -> None:
    """The base as a second model, as the policy with its adapter off, and as cached log-probs.

    An adapter starts as the base, so at first every pair is a tie, which the rounding of cached log-probs decides.
    """
    if not reads_reference(name):
        pytest.skip("reads no reference")
    same(train(name, tmp_path, peft=True, reference="adapter"), usual(name, peft=True))
    if cacheable(name):
        same(train(name, tmp_path, peft=True, reference="cached"), usual(name, peft=True), CACHED, "rewards/accuracies")


@any_split
def test_accumulation_of_an_adapter(name: str, usual: Callable[..., Trajectory], tmp_path: Path) -> None:
    same(train(name, tmp_path, peft=True, batch=2, accumulation=2), usual(name, peft=True))


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the trajectories of all objectives, trained in 2 gloo processes started once."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    got = subprocess.run(
        [*command, str(ROOT / "trajectory.py"), str(folder), *names(), PROBE.name],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert got.returncode == 0, got.stderr[-4000:]
    return folder


@pytest.mark.multi
@any_split
def test_two_processes(name: str, usual: Callable[..., Trajectory], two_processes: Path) -> None:
    same(Trajectory(**torch.load(two_processes / f"{name}.pt")), usual(name))
