"""The notebook of a first hour: it runs, and what it shows is small and complete."""

from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebooks" / "first.ipynb"


def test_every_cell_shows_its_output() -> None:
    """Executed once from top to bottom, without errors, and without paths of the machine it ran on."""
    book = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "execute_result", "display_data"}
    assert not [output for output in outputs if str(Path.home()) in str(output) or "/tmp/" in str(output)]
    assert NOTEBOOK.stat().st_size < 150_000


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder; its own loop has the numbers of `clpet.train`."""
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[2]))
    book = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(book, timeout=900, kernel_name="python3", resources=resources).execute()
    (loop,) = [cell for cell in book.cells if cell.source.startswith("bool((session.matrix.scores")]
    assert loop.outputs[0].data["text/plain"] == "True"
