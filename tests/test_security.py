"""What a checkpoint, a recipe or a model can make this program do: nothing that was not asked for."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import stat
from pathlib import Path

import pytest

from posttrain import settings
from posttrain.recipe import load_run
from posttrain.schema import UserError

ROOT = Path(__file__).parents[1]
PICKLES = {"pickle", "dill", "cloudpickle", "marshal", "shelve"}
SOURCES = sorted([*(ROOT / "posttrain").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_that_is_read_can_run_code(path: Path) -> None:
    """No pickle, no torch.load, no eval, no YAML with constructors: what is read are safetensors, JSON and plain YAML."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & {
                "pickle",
                "dill",
                "cloudpickle",
                "marshal",
                "shelve",
            }
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "np.load"), node.lineno


def test_remote_code_is_off_everywhere() -> None:
    found = [
        field.default
        for _, one in inspect.getmembers(settings, dataclasses.is_dataclass)
        for field in dataclasses.fields(one)
        if field.name == "trust_remote_code"
    ]
    assert len(found) >= 2 and set(found) == {False}


def test_a_recipe_runs_no_code_but_its_imports(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    recipe = tmp_path / "recipe.yaml"
    for value in (f"!!python/object/apply:os.mkdir ['{proof}']", f'${{oc.env:HOME}}${{eval:\'open("{proof}", "w")\'}}'):
        recipe.write_text(f"objective: dpo\nmodel: {value}\ndata: x.jsonl\n")
        with pytest.raises(UserError, match="not readable as YAML"):
            load_run(None, recipe)
    assert not proof.exists()
    (tmp_path / "module_of_mine.py").write_text(f"open({str(proof)!r}, 'w')\n")
    recipe.write_text("objective: dpo\nmodel: x\ndata: x.jsonl\nimports: [module_of_mine]\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        load_run(None, recipe)
    assert proof.exists()


def test_scratch_is_private() -> None:
    """Temporary folders come from tempfile, which makes them for their owner alone."""
    import tempfile

    users = [path for path in SOURCES if "tempfile" in path.read_text() or "/tmp" in path.read_text()]
    assert all("tempfile.TemporaryDirectory" in path.read_text() for path in users)
    with tempfile.TemporaryDirectory() as scratch:
        assert stat.S_IMODE(os.stat(scratch).st_mode) == 0o700
