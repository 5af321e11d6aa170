"""The shape of the code: which module may import which, what loads when, and that the trainers know no method."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import transformers

from posttrain.registry import names

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "posttrain"

LAYERS = [
    {"__main__", "quickstart"},
    {"cli", "docs", "methods", "launch"},
    {"plots"},
    {"evaluate", "iterate"},
    {"run", "check", "sample", "precompute", "anchors", "verdicts", "iterations"},
    {"card", "checkpoints", "records", "console", "memory", "references", "teachers", "teacher_fill", "trainers"},
    {"online", "steps"},
    {"trainer"},
    {"selfcheck"},
    {"teacher_cache", "teacher_server", "transcript"},
    {"rounds"},
    {"moving"},
    {"reference", "engines", "rewards", "learned", "foreign", "faults"},
    {"trained"},
    {"scoring"},
    {"models", "data"},
    {"loading", "rows", "encoding", "layouts", "conversations", "sources", "tally"},
    {"balance", "corrections", "trees", "meter", "mismatch", "recipe", "context", "vocabulary", "costs", "inside"},
    {"objectives", "settings", "shipped", "arguments", "written"},
    {"divergences", "selection", "advantages", "importance", "kl", "token_weights", "masks", "risk", "nested"},
    {"stats", "scores", "experience", "registry", "schema", "replacing", "leave", "best_of_n", "frontier", "similarity"},
]
"""Modules of posttrain from the top down. A module imports from its own layer or a lower one, never in a circle."""

KERNEL_USERS = {"vocabulary", "costs", "foreign", "reference", "teacher_fill", "models", "quickstart"}
"""The modules that may import posttrain_kernels."""

HEAVY = {
    "vllm": {"engines.vllm", "engines.worker"},
    "deepspeed": {"reference", "engines.hf"},
    "triton": set(),
    "trl": set(),
    "gguf": {"quickstart"},
    "vaderSentiment": {"rewards.rules"},
    "nltk": {"similarity"},
    "matplotlib": {"plots"},
}
"""Optional package -> the modules that may import it, and only inside a function."""


def modules() -> dict[str, Path]:
    """Dotted name below posttrain -> file."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def imports(name: str, path: Path) -> Iterator[tuple[str, ast.stmt]]:
    """(absolute dotted module, statement) of each import anywhere in a file; `from . import x` counts as x."""
    package = ["posttrain", *name.split(".")]
    if path.name != "__init__.py":
        package = package[:-1]
    elif name == "__init__":
        package = ["posttrain"]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(
                [*package[: len(package) - node.level + 1], *filter(None, [node.module])] if node.level else [node.module]
            )
            if base == "posttrain":
                yield from ((f"{base}.{alias.name}", node) for alias in node.names if not alias.name.startswith("__"))
            else:
                yield base, node


def type_checking_only(path: Path) -> set[int]:
    """Lines of the imports under `if TYPE_CHECKING`: they do not run."""
    guards = [
        n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"
    ]
    return {node.lineno for guard in guards for node in ast.walk(guard) if isinstance(node, ast.stmt)}


def ours(name: str, path: Path) -> set[str]:
    """Top-level modules of posttrain that a file imports at run time."""
    skipped = type_checking_only(path)
    return {
        target.split(".")[1]
        for target, node in imports(name, path)
        if target.startswith("posttrain.") and node.lineno not in skipped
    } - {name.split(".")[0]}


def layer(top: str) -> int:
    found = [depth for depth, layer in enumerate(LAYERS) if top in layer]
    assert found, f"posttrain/{top} is in no layer of tests/test_layout.py"
    return found[0]


@pytest.mark.parametrize("name", [name for name in modules() if name != "__init__"])
def test_imports_go_down(name: str) -> None:
    top = name.split(".")[0]
    upward = {other for other in ours(name, modules()[name]) if layer(other) < layer(top)}
    assert not upward, f"posttrain.{name} imports from a higher layer: {sorted(upward)}"


def test_no_import_circle() -> None:
    graph: dict[str, set[str]] = {}
    for name, path in modules().items():
        graph.setdefault(name.split(".")[0], set()).update(ours(name, path))
    list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("name", modules())
def test_only_some_import_the_kernel(name: str) -> None:
    users = {target for target, _ in imports(name, modules()[name]) if target.split(".")[0] == "posttrain_kernels"}
    assert not users or name.split(".")[0] in KERNEL_USERS


def test_the_kernel_imports_nothing_of_ours() -> None:
    for path in sorted((ROOT / "kernels" / "posttrain_kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            named += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not [module for module in named if module.split(".")[0] in ("posttrain", "transformers")], path.name


@pytest.mark.parametrize("name", modules())
def test_optional_packages_are_imported_where_they_are_used(name: str) -> None:
    path = modules()[name]
    top_level = {node.lineno for node in ast.parse(path.read_text()).body}
    for target, node in imports(name, path):
        package = target.split(".")[0]
        if package in HEAVY:
            assert name in HEAVY[package], f"posttrain.{name} imports {package}"
            assert node.lineno not in top_level, f"posttrain.{name} imports {package} at its top"


def test_kernels_folder_does_not_shadow_the_kernels_package() -> None:
    assert not list((ROOT / "kernels").glob("*.py"))
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(ROOT)


EMPTY_TORCH = """
import sys, types
sys.modules["torch"] = types.ModuleType("torch")
import {module}
heavy = sorted({{"transformers", "datasets", "peft", "accelerate", "numpy"}} & set(sys.modules))
assert not heavy, heavy
"""


@pytest.mark.parametrize("module", ["posttrain", "posttrain.settings", *names().values()])
def test_help_loads_no_torch(module: str) -> None:
    """Importing an objective touches no attribute of torch, which help leaves out, nor loads anything else that is slow."""
    got = subprocess.run([sys.executable, "-c", EMPTY_TORCH.format(module=module)], capture_output=True, text=True)
    assert got.returncode == 0, got.stderr


def test_importing_posttrain_loads_nothing() -> None:
    script = "import sys; before = set(sys.modules); import posttrain; print(sorted(set(sys.modules) - before))"
    got = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert got.stdout.strip() == "['posttrain']"


TRAINERS = [path for path in (PACKAGE / f"{name}.py" for name in ("trainer", "online", "steps")) if path.exists()]


@pytest.mark.parametrize("path", TRAINERS, ids=lambda path: path.name)
def test_trainers_use_public_members_of_transformers_only(path: Path) -> None:
    private = {name for name in dir(transformers.Trainer) if name.startswith("_") and not name.startswith("__")}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.name not in private, f"{path.name}:{node.lineno} overrides {node.name}"
        if isinstance(node, ast.Attribute):
            assert node.attr not in private, f"{path.name}:{node.lineno} uses {node.attr}"


METHODLESS = [
    path
    for path in (
        PACKAGE / f"{name}.py"
        for name in ("trainer", "online", "steps", "rounds", "reference", "models", "trees", "selfcheck", "meter", "stats")
    )
    if path.exists()
]


@pytest.mark.parametrize("path", METHODLESS, ids=lambda path: path.name)
def test_no_method_is_named_outside_its_file(path: Path) -> None:
    words = set(re.findall(r"[a-z0-9]+", path.read_text().lower()))
    assert not words & (set(names()) - {"reward"})  # which is a word, too


@pytest.mark.parametrize(
    "path", sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]), ids=lambda path: path.stem
)
def test_house_rules(path: Path) -> None:
    text = path.read_text()
    assert path.name != "utils.py"
    assert len(text.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(text)), "no module docstring"
    assert not re.search(r"\bhasattr\(|\bgetattr\([^()]*,[^()]*,[^()]*\)|\bTODO\b|\bFIXME\b", text)
