"""The registry learns a method from its declaration, finds it by name, and refuses what is taken or unknown."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest

from posttrain import registry
from posttrain.registry import OBJECTIVES, find, names, objective
from posttrain.schema import UserError
from posttrain.stats import Loss, Pairs


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Settings of a probe."""

    entropy: bool = False
    """Whether it asks for entropies."""


def probe(config: ProbeConfig, pairs: Pairs) -> Loss:
    return Loss(pairs.chosen.logp - pairs.rejected.logp)


@pytest.fixture(autouse=True)
def _leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.all_objectives()  # so that no import registers into the copy
    monkeypatch.setattr(registry, "OBJECTIVES", dict(OBJECTIVES))


def test_learns_from_annotations_and_docstring() -> None:
    assert objective(reference=False, want=["entropy"], start=2.0)(probe) is probe
    got = find("probe")
    assert (got.name, got.config, got.family) == ("probe", ProbeConfig, Pairs)
    assert not got.reads_reference(ProbeConfig())
    assert list(got.want(ProbeConfig())) == ["entropy"] and got.start(ProbeConfig()) == 2.0
    assert got.document == sys.modules[__name__].__doc__


def test_want_start_and_reference_may_depend_on_the_settings() -> None:
    def want(config: ProbeConfig) -> list[str]:
        return ["entropy"] if config.entropy else []

    objective(reference=lambda config: config.entropy, want=want, start=lambda config: 1.0 if config.entropy else None)(probe)
    got = find("probe")
    assert [list(got.want(ProbeConfig(entropy=flag))) for flag in (False, True)] == [[], ["entropy"]]
    assert [got.reads_reference(ProbeConfig(entropy=flag)) for flag in (False, True)] == [False, True]
    assert [got.start(ProbeConfig(entropy=flag)) for flag in (False, True)] == [None, 1.0]


def test_unknown_name_lists_those_that_exist() -> None:
    with pytest.raises(UserError) as error:
        find("dpoo")
    assert str(error.value) == f"objective 'dpoo' does not exist; did you mean dpo? Possible: {', '.join(sorted(names()))}"


def test_a_taken_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "__name__", "dpo")
    with pytest.raises(UserError) as error:
        objective(reference=True)(probe)
    assert str(error.value) == f"objective 'dpo' in {__name__} is already registered by posttrain.objectives.preference.dpo"


def test_finding_one_imports_only_its_file() -> None:
    script = (
        "import sys; from posttrain.registry import find; find('dpo');"
        "print([m for m in sys.modules if m.startswith('posttrain.objectives.') and m.count('.') == 3])"
    )
    got = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert got.stdout.strip() == "['posttrain.objectives.preference.dpo']"
