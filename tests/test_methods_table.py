"""The table of methods in the README is what the declarations say."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from posttrain import methods, registry
from posttrain.cli import main
from posttrain.schema import UserError

README = Path(__file__).parents[1] / "README.md"


def rows(text: str) -> dict[str, list[str]]:
    """Name of the method -> the cells of its row."""
    cells = [[cell.strip() for cell in line.split(" | ")] for line in text.splitlines() if line.startswith("| [`")]
    return {row[0].removeprefix("| [`").partition("`")[0]: row for row in cells}


def test_the_readme_has_the_table() -> None:
    text = README.read_text(encoding="utf-8")
    inside = text.partition(methods.MARKS[0])[2].partition(methods.MARKS[1])[0].strip()
    assert inside == methods.table(), "posttrain show --table README.md"
    assert list(rows(inside)) == sorted(registry.names())
    assert all((README.parent / row[0].partition("(")[2].rstrip(")")).is_file() for row in rows(inside).values())


def test_rows_are_read_from_the_declarations() -> None:
    table = rows(methods.table())
    assert all(len(row) == 5 and row[1] and row[3] and row[4].endswith(". |") for row in table.values())
    paper = "[Ethayarajh et al. 2024](https://arxiv.org/abs/2402.01306)"
    start = "lambda_D / 2 for desirable rows, lambda_U / 2 for the others"
    assert table["kto"][1:4] == [paper, "reference; column `label`; a pass before each step", start]
    assert table["tdpo"][2] == "reference; over the vocabulary: `forward_kl`"
    assert table["sigmoid_norm"][1] == "TRL's `sigmoid_norm`"
    assert table["simpo"][2] == ""


def test_the_command_brings_a_file_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "file.md"
    path.write_text(f"before\n{methods.MARKS[0]}\nold\n{methods.MARKS[1]}\nafter\n", encoding="utf-8")
    for _ in range(2):
        assert CliRunner().invoke(main, ["show", "--table", str(path)]).exit_code == 0
        assert (
            path.read_text(encoding="utf-8")
            == f"before\n{methods.MARKS[0]}\n\n{methods.table()}\n\n{methods.MARKS[1]}\nafter\n"
        )


def test_a_file_without_the_marks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.md"
    with pytest.raises(UserError, match=r"--table: file .*file\.md does not exist"):
        methods.write(path)
    path.write_text("nothing", encoding="utf-8")
    with pytest.raises(UserError, match="has no lines <!-- methods"):
        methods.write(path)
    assert path.read_text(encoding="utf-8") == "nothing"
