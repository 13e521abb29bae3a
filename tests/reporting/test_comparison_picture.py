"""`clpet runs --compare KEY --picture FILE`: what the picture of a comparison of scores shows, and its formats."""

import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from clpet.reporting.plots import canvas, comparison
from clpet.reporting.run_groups import make_sections
from clpet.runtime.untrusted_json import find_runs
from tests.reporting.test_comparison import write_run

pytestmark = pytest.mark.usefixtures("rendered")
FULL = {"scores": [[None, None], [75.0, None], [25.0, 75.0]]}  # forgetting 50


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list:
    """Two seeds of one method, one of another, one of a third that learns the tasks in another order per seed."""
    monkeypatch.chdir(tmp_path)
    for seed, shift in ((0, 0.0), (1, 20.0)):
        scores = [[None, None], [60.0 + shift, None], [20.0 + shift, 60.0 + shift]]
        write_run("replay", seed, signature="replay", scores=scores)
        write_run("kif", seed, signature="kif", tasks=["a", "b"] if seed else ["b", "a"], **FULL)
    write_run("ewc", signature="ewc", **FULL)
    return find_runs(tmp_path / "outputs")


def test_the_panels_show_means_deviations_and_matrices(runs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figures: list = []
    monkeypatch.setattr(comparison, "save", lambda figure, path: figures.append(figure) or path)
    (section,) = make_sections(runs, ["method"])
    comparison.compare_rows(section, tmp_path / "x.png", "title")
    curves, scatter, cost, *matrices = figures[0].axes
    means = {line.get_label(): line.get_ydata() for line in curves.get_lines()}
    assert means["replay"] == pytest.approx([70, 50])  # seeds: 60, 80; then (20 + 60) / 2 and (40 + 80) / 2
    assert means["ewc"] == pytest.approx([75, 50])
    band = curves.collections[[line.get_label() for line in curves.get_lines()].index("replay")].get_paths()[0]
    assert band.vertices[:, 1].max() == pytest.approx(70 + np.std([60, 80], ddof=1))
    dots = {tuple(np.round(container.lines[0].get_xydata()[0], 6)) for container in scatter.containers}
    assert dots == {(70.0, 40.0), (75.0, 50.0)}  # learning accuracy and forgetting; kif and ewc share a place
    assert len(cost.containers) == 3
    titles = [axes.get_title() for axes in matrices]
    assert titles == ["ewc", "kif", "replay"]
    assert [text.get_text() for text in matrices[1].texts] == ["the runs have different task orders"]
    assert [text.get_text() for text in matrices[2].texts] == ["70", "30", "70"]


@pytest.mark.parametrize(("ending", "first"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_the_ending_chooses_the_format(ending: str, first: bytes, runs, clpet, tmp_path: Path) -> None:
    answer = clpet("runs", str(tmp_path / "outputs"), "--compare", "method", "--picture", f"p.{ending}")
    assert (answer.code, answer.err) == (0, "")
    assert Path(f"p.{ending}").read_bytes().startswith(first)


def test_another_ending_is_refused(runs, clpet, tmp_path: Path) -> None:
    answer = clpet("runs", str(tmp_path / "outputs"), "--compare", "method", "--picture", "p.doc")
    assert (answer.code, answer.err) == (2, "clpet: --picture p.doc: the name must end in .png, .pdf, .svg\n")


def test_names_are_drawn_in_installed_fonts_for_their_script() -> None:
    """Only fonts that exist are used; where there is one for Chinese, no glyph is missing."""
    families = canvas.font_families()
    assert families[0] == "DejaVu Sans"
    assert set(families) <= set(matplotlib.font_manager.get_font_names())
    figure, axes = canvas.new_figure(2, 1)
    axes.set_title("标签 etiqueta")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        FigureCanvasAgg(figure).draw()
    missing = any("Glyph" in str(warning.message) for warning in caught)
    assert missing is not any(name in families for name in canvas.FALLBACK_FONTS[0])
