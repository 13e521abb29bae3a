"""Names from data are escaped for terminals, tables and spreadsheets."""

import csv
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from clpet.escape import inline, latex, markdown, printable, spreadsheet
from clpet.metrics.transfer_matrix import TransferMatrix
from clpet.reporting.plots.transfer_matrix import transfer_heatmap
from clpet.reporting.progress import Display
from clpet.reporting.tables import format_table, table
from clpet.runs.run_dir import transfer_csv
from tests.conftest import tiny_args, write_words


@pytest.mark.parametrize(("text", "shown"), [
    ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"), ("a\x00b\x7f", r"a\x00b\x7f"), ("left\u202eright", r"left\u202eright"),
    ("half \ud800", r"half \ud800"), ("two\nlines\r", r"two\nlines\r"), ("caf\u00e9 \u65e5\u672c \u0646\u200c\u0645\u00a0!", "caf\u00e9 \u65e5\u672c \u0646\u200c\u0645\u00a0!"),
])  # fmt: skip
def test_control_characters_are_escaped(text: str, shown: str) -> None:
    assert inline(text) == shown
    assert printable("two\nlines\x1b") == "two\nlines\\x1b"
    assert table(["name"], [[text]]).count("\n") == 1


@pytest.mark.parametrize(("text", "shown"), [
    ("a|b", r"a\|b"), ("*x* `y`", r"\*x\* \`y\`"), ("<img src=x>", r"\<img src=x>"), ("learning_accuracy", "learning_accuracy"),
    ("_x_", r"\_x\_"), ("[a](b)", r"\[a\](b)"), ("a\\|b", r"a\\\|b"), ("a\nb", r"a\\nb"),
])  # fmt: skip
def test_cells_of_markdown(text: str, shown: str) -> None:
    assert markdown(text) == shown


@pytest.mark.parametrize("text", ["=1+1", "+x", "-cmd", "@sum", "-1+2", "=cmd|' /C calc'!A0", "\uff1d1"])
def test_names_are_not_formulas_of_a_spreadsheet(text: str) -> None:
    assert spreadsheet(text) == f"'{text}"


@pytest.mark.parametrize("text", ["-78.14", "-78.14 ± 0.38", "-", "+3", "1e-5", "-1,234.5", "a=b", ""])
def test_a_spreadsheet_keeps_numbers(text: str) -> None:
    assert spreadsheet(text) == text


def test_latex_prints_its_special_characters() -> None:
    assert (
        latex("R&D_50%{x}\\y~^#$ ± <")
        == r"R\&D\_50\%\{x\}\textbackslash{}y\textasciitilde{}\textasciicircum{}\#\$ $\pm$ \textless{}"
    )


def test_tables_of_runs_hold_one_cell_per_name() -> None:
    name = "=a|b\x1b_&"
    assert "\x1b" not in "".join(
        format_table(["key", "n"], [[name, "1"]], form) for form in ("text", "md", "csv", "tex")
    )
    markdown_row = format_table(["key", "n"], [[name, "1"]], "md").splitlines()[2]
    assert markdown_row.replace(r"\|", "").count("|") == 3
    assert list(csv.reader(io.StringIO(format_table(["key", "n"], [[name, "-1"]], "csv"))))[1] == [r"'=a|b\x1b_&", "-1"]


@pytest.mark.usefixtures("rendered")
def test_the_files_and_pictures_of_a_run(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    matrix = TransferMatrix(["=1+1", r"$\frac{$", "\x1b[2J"])
    matrix.record(0, 0, 50.0, 1, 2)
    assert transfer_csv(matrix).splitlines()[0] == "after,'=1+1,$\\frac{$,\\x1b[2J"
    assert transfer_heatmap(matrix, tmp_path / "x.png", "$\\frac{ on").is_file()
    assert not [str(warning.message) for warning in recwarn if "Glyph 27" in str(warning.message)]


def test_the_display_shows_markup_as_text() -> None:
    text = io.StringIO()
    display = Display(Console(file=text, force_terminal=True, width=120, color_system=None), 2)
    display.task(1, "[/bold] :red_circle: \x1b]0;title\x07")
    display.fit("", 1, 1)
    display.close()
    display.print("[bold]x[/bold] :red_circle: \x1b[2J")
    out = text.getvalue()
    assert "[bold]x[/bold] :red_circle: \\x1b[2J" in out
    assert "\x1b]0" not in out
    assert "\x1b[2J" not in out


def test_a_run_and_the_report_on_its_data(clpet, tmp_path: Path) -> None:
    """Task names with control characters are escaped in results, warnings and errors of the command line."""
    folder, bad = write_words(tmp_path / "w"), "\x1b[31mriver\x07"
    for file in folder.iterdir():
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows += rows[-1:] if file.stem == "test" else []
        changed = [{**row, "task": bad if row["task"] == "river" else row["task"]} for row in rows]
        file.write_text("".join(json.dumps(row) + "\n" for row in changed))
    args = tiny_args(folder, "method=sequential", "train.epochs=1")
    for words in (["train", *args], ["runs", "outputs"], ["data", "files", *args[4:-2]]):
        result = clpet(*words)
        assert result.code == 0, result.err
        assert "\x1b" not in result.out + result.err
        assert "\x07" not in result.out + result.err
    (run,) = tmp_path.glob("outputs/*/*/s*")
    assert "\x1b" not in (run / "train.log").read_text() + (run / "transfer.csv").read_text()
    result = clpet("train", *args, "benchmark.tasks=[\x1b[2J]")
    assert result.code == 2
    assert "\x1b" not in result.err
