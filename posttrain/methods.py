"""The table of methods in the README, read from the declarations and docstrings of the objectives."""

from __future__ import annotations

import re
from pathlib import Path

from . import registry
from .schema import UserError
from .stats import Costs, Inside, Ranked, Sizes, Spans, States, Top, Want, columns_of

MARKS = ("<!-- methods: from `posttrain show --table README.md` -->", "<!-- end of methods -->")
"""The lines between which a file has the table of methods."""

_SMALL = Sizes(hidden=1, vocabulary=2, reference_hidden=1, reference_layers=1)
"""Sizes that do to see whether a method has parameters."""


def table() -> str:
    """The objectives as a Markdown table: paper, what each needs, start value, its line."""
    rows = ["| method | paper | needs | loss at policy == reference | |", "|---|---|---|---|---|"]
    for name, module in sorted(registry.names().items()):
        objective, method = registry.find(name), f"[`{name}`]({module.replace('.', '/')}.py)"
        document = objective.document
        cells = [method, _paper(document), _needs(objective), _start(document), document.partition("\n")[0]]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def write(path: Path) -> None:
    """Bring the table of methods in a file up to date.

    Raises:
        UserError: there is no such file, or it lacks one of `MARKS`.
    """
    if not path.is_file():
        raise UserError(f"--table: file {path} does not exist")
    before, first, rest = path.read_text(encoding="utf-8").partition(MARKS[0])
    _, second, after = rest.partition(MARKS[1])
    if not first or not second:
        raise UserError(f"--table: {path} has no lines {MARKS[0]} and {MARKS[1]} for the table to stand between")
    path.write_text(f"{before}{first}\n\n{table()}\n\n{second}{after}", encoding="utf-8")


def _paragraph(document: str, opening: str) -> str:
    """What stands behind an opening word of a docstring, up to the next empty line or the value at the reference."""
    found = re.search(rf"^{re.escape(opening)} (.+?)(?=\n\n|\nValue at|\Z)", document, re.DOTALL | re.MULTILINE)
    return " ".join(found[1].split()) if found else ""


def _paper(document: str) -> str:
    """Authors and year of the first source, with its address where it is on arXiv."""
    source = _paragraph(document, "Source:").partition(";")[0]
    dated = re.match(r"[^;:]*?\b(?:19|20)\d\d\b", source)
    name = dated[0] if dated else re.split(r"[,:]|\. ", source)[0].rstrip(".")
    number = re.search(r"arXiv:(\d{4}\.\d{4,5})", source)
    return f"[{name}](https://arxiv.org/abs/{number[1]})" if number else name


def _start(document: str) -> str:
    return _paragraph(document, "Value at policy == reference:").removesuffix(".")


def _needs(objective: registry.Objective) -> str:
    """What an objective with default settings takes beyond the policy's log-probs of pairs."""
    columns = [f"`{name}`" for name, absent in columns_of(objective.family).items() if absent is None]
    config = objective.config()
    inside = [one for one in objective.want(config) if isinstance(one, Inside)]
    wanted = [f"`{_statistic(one)}`" for one in objective.want(config) if one not in inside]
    needs = ["reference"] if objective.reads_reference(config) else []
    needs = ["teacher"] if objective.reads_teacher else needs
    needs = ["rewards", *needs] if objective.lesson is not None else needs
    needs += [f"over the vocabulary: {', '.join(wanted)}"] if wanted else []
    needs += [f"inside the reference: {', '.join(map(_inside, inside))}"] if inside else []
    needs += ["parameters of its own"] if objective.learned is not None and objective.learned.start(config, _SMALL) else []
    needs += [f"column {', '.join(columns)}"] if columns else []
    needs += ["a pass before each step"] if objective.before is not None else []
    return "; ".join(needs)


def _inside(want: Inside) -> str:
    return "states" if isinstance(want, States) else want.of


def _statistic(want: Want) -> str:
    match want:
        case str():
            return want
        case Top():
            return f"top {want.k}"
        case Ranked():
            return f"{want.k} largest"
        case Costs():
            return f"costs of {want.rows} tokens"
        case Spans():
            return "adjacent tokens"
    return want.name
