"""The report of real runs in a real browser: a sweep of four methods and three seeds, and a benchmark with HTML in it."""

import csv
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from clpet.metrics.transfer_matrix import TransferMatrix
from clpet.runtime.untrusted_json import find_runs
from tests.conftest import run_cli

playwright = pytest.importorskip("playwright.sync_api")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("browser"),  # one worker: the runs are trained once
    pytest.mark.skipif(BROWSER is None, reason="needs chromium (apt-get install chromium)"),
]
METHODS = ["ewc", "o_lora", "replay", "sequential"]
HOSTILE = "<script>alert(1)</script>"
HOSTILE_TEXT = "<img src=x onerror=alert(2)>"


def write_hostile_data(folder: Path) -> None:
    """Two tasks of two labels; names of tasks and labels, and the texts, contain HTML."""
    folder.mkdir()
    for split, copies in (("train", 20), ("test", 5)):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label", "dom"])
            for task in ("plain", "</script><b>bold"):
                for number in range(2 * copies):
                    label = f"{task} {HOSTILE if number % 2 else 'ok'}"
                    writer.writerow([f"{HOSTILE_TEXT} {split} {number} {task}", label, task])


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with 12 runs of python_stdlib and one of the hostile data, and its report."""
    folder = tmp_path_factory.mktemp("report")
    write_hostile_data(folder / "hostile")
    common = ["debug=smoke", f"output_dir={folder / 'outputs'}"]
    assert run_cli("train", "-m", f"method={','.join(METHODS)}", "seed=0,1,2", *common) == 0
    assert (
        run_cli("train", "benchmark=files", f"data_dir={folder / 'hostile'}", "task=dom", "method=sequential", *common)
        == 0
    )
    assert run_cli("report", str(folder / "outputs"), "-o", str(folder / "report.html")) == 0
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: "playwright.Browser", outputs: Path) -> Iterator["playwright.Page"]:
    """The report in a browser; afterwards: nothing was reported on the console, requested or run from data."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    events: list[str] = []
    page.on("console", lambda message: events.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: events.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (events.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    address = (outputs / "report.html").as_uri()
    page.on("request", lambda request: None if request.url in (address, "data:,") else events.append(request.url))
    page.goto(address)
    page.wait_for_selector("#section-0 .chart svg")
    yield page
    assert events == []
    page.close()


def open_section(page: "playwright.Page", benchmark: str) -> "playwright.Locator":
    """Shows the section of a benchmark."""
    page.locator("[data-tabs=sections]").get_by_role("tab", name=benchmark).click()
    return page.locator("section.panel:visible")


def matrix_of(part: "playwright.Locator", name: str) -> list[list[str]]:
    """The cells of the matrix with the heading `name`, row by row."""
    block = part.locator(".grid > div", has=part.page.locator("h3", has_text=name))
    return [row.locator("td").all_inner_texts() for row in block.locator("tbody tr").all()]


def shown(values: np.ndarray, sign: str = "") -> list[list[str]]:
    """The measured rows of a matrix as the page writes them."""
    return [
        ["" if v != v else f"{v:{sign}.{0 if abs(v) >= 99.95 else 1}f}".replace("+0.0", "0.0") for v in row]
        for row in values
        if not np.isnan(row).all()
    ]


def test_a_click_on_a_column_sorts_and_the_field_filters(page: "playwright.Page") -> None:
    part = open_section(page, "python_stdlib")
    table = part.locator("table.sortable").first
    column = table.locator("th").all_inner_texts().index("average")

    def averages() -> list[float]:
        cells = table.locator(f"tbody tr:visible td:nth-child({column + 1})").all_inner_texts()
        return [float(cell.split()[0]) for cell in cells]

    assert len(averages()) == len(METHODS)
    table.get_by_role("button", name="average", exact=True).click()
    assert averages() == sorted(averages(), reverse=True)
    table.get_by_role("button", name="average", exact=True).click()
    assert averages() == sorted(averages())
    assert table.locator("th").nth(column).get_attribute("aria-sort") == "ascending"
    table.get_by_role("button", name="method").click()
    assert table.locator("tbody td:first-child").all_inner_texts() == METHODS

    part.get_by_placeholder("filter").fill("LORA")
    assert table.locator("tbody tr:visible td:first-child").all_inner_texts() == ["o_lora"]
    part.get_by_placeholder("filter").fill("")
    assert len(averages()) == len(METHODS)


def test_the_matrices_are_those_of_the_runs_for_every_seed_and_their_mean(
    page: "playwright.Page", outputs: Path
) -> None:
    runs = {(run["method"], run["seed"]): run for _, run in find_runs(outputs / "outputs")}
    matrices = [TransferMatrix.from_json(runs["replay", seed]) for seed in (0, 1, 2)]
    part = open_section(page, "python_stdlib").locator(".matrices")

    means = np.mean([matrix.scores for matrix in matrices], axis=0)
    page_means = [[float(cell) for cell in row] for row in matrix_of(part, "replay")]
    assert np.allclose(page_means, means, atol=0.051)

    slider = part.locator("input[type=range]")
    slider.focus()
    for seed in (0, 1):
        slider.press("ArrowRight")
        assert part.locator("output").inner_text() == f"seed {seed}"
        assert matrix_of(part, "replay") == shown(matrices[seed].scores)
    part.get_by_role("tab", name="B: backward").click()
    assert matrix_of(part, "replay") == shown(matrices[1].backward, "+")
    part.get_by_role("tab", name="F: forward").click()
    task_matrix = TransferMatrix.from_json(runs["replay", 1], runs["replay", 1]["task_scores"])
    assert matrix_of(part, "replay") == shown(task_matrix.forward, "+")
    part.get_by_role("tab", name="each task's labels").click()
    assert matrix_of(part, "replay") == shown(task_matrix.scores)


def test_a_point_shows_its_values_and_the_legend_selects_a_row(page: "playwright.Page", outputs: Path) -> None:
    runs = [run for _, run in find_runs(outputs / "outputs") if run["method"] == "replay"]
    average = np.mean([TransferMatrix.from_json(run).average(2, 2) for run in runs])
    chart = open_section(page, "python_stdlib").locator(".chart").first
    points = chart.locator("svg .mark-symbol path")
    points.nth(5 * METHODS.index("replay") + 1).hover(force=True)  # after the second of five tasks
    values = page.locator("#vg-tooltip-element").inner_text().split()
    assert f"{average:.4g}" in values
    chart.locator(".role-legend-symbol path").nth(METHODS.index("replay")).click(force=True)
    lines = chart.locator("svg .mark-line path")
    opacity = [float(line.get_attribute("opacity") or 1) for line in lines.all()]
    assert opacity.index(max(opacity)) == METHODS.index("replay")
    assert sorted(opacity)[-2] < 0.2


def test_every_task_of_a_run_shows_its_answers(page: "playwright.Page", outputs: Path) -> None:
    run = next(run for _, run in find_runs(outputs / "outputs") if (run["method"], run["seed"]) == ("ewc", 2))
    part = open_section(page, "python_stdlib").locator(".answers")
    part.locator("select.row").select_option("ewc")
    part.locator("select.seed").select_option("2")
    for position, task in enumerate(run["tasks"]):
        part.get_by_role("tab", name=task).click()
        assert part.locator(".figures b").first.inner_text() == f"{run['scores'][-1][position]:.1f}"
        counts = [int(text) for text in part.locator(".heat td").all_inner_texts() if text]
        assert sum(counts) == run["total"][-1][position]
    part.get_by_role("tab", name=run["tasks"][0]).focus()
    page.keyboard.press("ArrowRight")
    assert part.locator("[role=tab][aria-selected=true]").inner_text() == run["tasks"][1]


def test_html_in_names_labels_and_texts_is_text(page: "playwright.Page") -> None:
    part = open_section(page, "files")
    assert f"{HOSTILE_TEXT} test" in part.locator(".mistakes").inner_text()
    assert HOSTILE in part.locator(".answers").inner_text()
    part.get_by_role("tab", name="</script><b>bold").click()
    assert "</script><b>bold" in part.locator(".answers .labels").inner_text()
    assert page.locator("main b", has_text="bold").count() == 0
    assert page.locator("main img").count() == 0


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_screen(page: "playwright.Page", width: int, tmp_path: Path) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    for benchmark in ("python_stdlib", "files"):
        open_section(page, benchmark)
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.screenshot(path=tmp_path / f"report-{width}.png", full_page=True)


def test_the_page_prints_all_sections(page: "playwright.Page") -> None:
    page.emulate_media(media="print")
    assert page.locator("section.panel:visible").count() == 2
    assert len(page.pdf()) > 50_000
