"""`clpet report` on runs written by hand: the figures of the page, what it escapes, and what it refuses."""

import base64
import hashlib
import html
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import vl_convert

from clpet.reporting.answers import Answer, mistakes
from clpet.reporting.points import seen_averages
from clpet.reporting.report.page import build_report, script_json
from clpet.reporting.run_costs import COSTS
from clpet.reporting.run_groups import make_sections
from clpet.reporting.run_metrics import MeanStd
from clpet.reporting.step_lines import MAX_POINTS, mean_losses
from clpet.runtime.untrusted_json import find_runs, read_results
from tests.reporting.test_comparison import COST, write_run

HOSTILE = "<script>alert(1)</script>"


def write_answers(folder: Path, hits: dict[str, list[int]]) -> None:
    """Writes predictions as a run does: four examples per task; a wrong answer is z."""
    rows = [
        (task, label, label if right else "z", bool(right), probability)
        for task, scores in hits.items()
        for label, right, probability in zip(("x", HOSTILE, "x", "y"), scores, (0.6, 0.7, 0.8, 0.9), strict=True)
    ]
    names = ("task", "label", "prediction", "score", "probability")
    columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    table = pyarrow.table({"example": list(range(len(rows))), **columns, "own_prediction": columns["prediction"]})
    pyarrow.parquet.write_table(table, folder / "predictions" / f"after-{len(hits):03d}.parquet")


def write_runs() -> list[Path]:
    """Three seeds of two methods with predictions; the first run has a step log."""
    folders = []
    for method, gain in (("ewc", 0), ("kif", 1)):
        for seed in (0, 1, 2):
            hits = {"a": [1, 1, gain, int(seed > 0)], HOSTILE: [1, 0, 1, gain]}
            data = {"fingerprint": "0123456789abcdef", "warnings": [f"a remark on {HOSTILE}"]}
            folders.append(write_run(method, seed, hits, signature=method, data=data))
            write_answers(folders[-1], hits)
    (folders[0] / "steps.jsonl").write_text('{"step": 10, "task_name": "a", "loss": 2.0}\n{"step": 20, "loss": 1.0}\n')
    return folders


def data_of(page: str) -> list[object]:
    """The JSON values inside the page."""
    return [json.loads(text) for text in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.S)]


def test_the_interval_over_seeds_by_hand() -> None:
    """1, 2 and 3: mean 2, deviation 1, t of two degrees of freedom 4.3027, so 2 ± 4.3027 / sqrt(3)."""
    low, high = MeanStd(2.0, 1.0, 3).interval() or (0, 0)
    assert (low, high) == (pytest.approx(2 - 2.4841, abs=1e-4), pytest.approx(2 + 2.4841, abs=1e-4))
    assert MeanStd(2.0, None, 1).interval() is None


def test_mistakes_are_ordered_by_probability_or_else_one_per_kind() -> None:
    sure = [Answer(i, "x", "y", right, p) for i, (right, p) in enumerate([(False, 0.5), (True, 0.9), (False, 0.7)])]
    assert [answer.example for answer in mistakes(sure)] == [2, 0]
    pairs = ["xy", "xz", "xz", "yx"]
    unsure = [Answer(i, a, b, False, None) for i, (a, b) in enumerate(pairs)]
    assert [answer.example for answer in mistakes(unsure)] == [1, 0, 3]


def test_losses_are_averaged_over_neighbouring_steps(tmp_path: Path) -> None:
    assert mean_losses(tmp_path) == []
    lines = [json.dumps({"step": i, "task_name": "a", "loss": float(i % 2)}) for i in range(1, 2 * MAX_POINTS + 1)]
    bad = ['{"step": 5, "validation": 1.0}', '{"step": 6, "loss": NaN}', "[1]", '{"step": 7, "lo']
    (tmp_path / "steps.jsonl").write_text("\n".join(lines + bad))
    losses = mean_losses(tmp_path)
    assert len(losses) == MAX_POINTS
    assert losses[0] == (2, 0.5, "a", "")
    assert losses[-1][0] == 2 * MAX_POINTS


def test_costs_by_hand_and_of_a_run_that_did_not_record_them(clpet) -> None:
    """Of two tasks: FLOPs are added, stored bytes are those of the last task; runs of older versions lack both."""
    cost = [{**COST, "forward_flops": 7.0, "backward_flops": 5.0, "stored_bytes": size} for size in (10, 30)]
    run = read_results(write_run("ewc", cost=cost) / "results.json")
    assert [COSTS[name].value(run) for name in ("flops", "stored_bytes")] == [24, 30]
    old = read_results(write_run("kif") / "results.json")
    assert [COSTS[name].value(old) for name in ("flops", "stored_bytes", "seconds")] == [None, None, 2]


def test_the_band_over_seeds_by_hand(clpet) -> None:
    """ewc answers 2, 3 and 3 of 4 of the first task right and 2 of 4 of the second: averages 50, 62.5 and 62.5."""
    write_runs()
    (section,) = make_sections(find_runs(Path("outputs")), ["method"])
    last = [point for point in seen_averages(section) if point["row"] == "ewc"][-1]
    values = [50, 62.5, 62.5]
    assert last["x"] == 2
    assert last["y"] == pytest.approx(np.mean(values), rel=1e-5)
    assert last["high"] == pytest.approx(np.mean(values) + np.std(values, ddof=1), rel=1e-5)


def test_the_chart_library_accepts_every_chart_and_a_row_has_one_colour_in_all(clpet) -> None:
    write_runs()
    report = build_report("runs", find_runs(Path("outputs")), ["method"], [])
    charts = report.sections[0].charts
    assert [chart.title for chart in charts] == ["Average after each task", "Cost and score", "Training loss"]
    for chart in charts:
        assert chart.spec["encoding"]["color"]["scale"] == {"domain": ["ewc", "kif"]}
        compiled = vl_convert.vegalite_to_vega(chart.spec)
        assert {"name": "color", "type": "ordinal", "domain": ["ewc", "kif"], "range": "category"} in compiled["scales"]


def test_the_page_holds_every_part_and_escapes_what_comes_from_data(clpet) -> None:
    write_runs()
    result = clpet("report", "outputs", "-o", "page.html")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("page.html: 6 runs, ")
    page = Path("page.html").read_text("utf-8")

    assert "58.33 ± 7.22" in page  # ewc
    assert "<strong>83.33 ± 7.22</strong>" in page  # kif, the best
    assert "-25.00 [-50.00, +0.00]" in page  # the paired test of `clpet runs --compare`, with ewc minus kif
    for title in ("Average after each task", "Cost and score", "Training loss", "Transfer matrices", "What was run"):
        assert title in page
    assert "clpet train -m method=ewc seed=0,1,2" in page

    body = page[page.index("<body>") : page.index("</main>")]
    assert HOSTILE not in body
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in body
    answers = next(value for value in data_of(page) if isinstance(value, dict) and "words" in value)
    assert HOSTILE in answers["words"]
    task = answers["runs"][0]["tasks"][0]
    assert (task["examples"], task["correct"]) == (4, 2)
    x, y, z = map(answers["words"].index, "xyz")
    assert task["mistakes"] == [[3, y, z, 0.9, None], [2, x, z, 0.8, None]]
    assert task["f1"] == pytest.approx((200 / 3 + 100 + 0) / 3, abs=0.01)  # x, the hostile label, y


def test_the_policy_of_the_page_allows_its_two_scripts_and_no_request(clpet) -> None:
    write_runs()
    clpet("report", "-o", "page.html")
    page = Path("page.html").read_text("utf-8")
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    policy = html.unescape(policy)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert re.findall(r"sha256-([^']*)", policy) == hashes
    assert len(hashes) == 2
    outside = re.sub(r"<script.*?</script>", "", page, flags=re.S)
    assert re.findall(r"(?:src|href)=\"(?!#|data:)[^\"]*", outside) == []


def test_json_in_a_script_cannot_end_it() -> None:
    text = script_json({"</script><!--": ["\u2028", "a\u202eb", HOSTILE]})
    assert not set("<>&\u2028\u202e") & set(text)
    assert json.loads(text) == {"</script><!--": ["\\u2028", "a\\u202eb", HOSTILE]}


def test_show_writes_the_report_of_one_run(clpet) -> None:
    folder = write_runs()[0]
    assert clpet("show", str(folder), "--html").out == f"{folder}/report.html: 1 run, 0.9 MB\n"
    assert "<h1>ewc on files, seed 0</h1>" in (folder / "report.html").read_text("utf-8")
    assert clpet("show", str(folder), "--html", "one.html").code == 0
    assert Path("one.html").is_file()
    for words, message in (
        (["outputs", "--html"], "outputs is not the directory of a finished run"),
        ([str(folder), "--html", "--metrics"], "--metrics, --confusion and --mistakes are printed"),
    ):
        result = clpet("show", *words)
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert message in result.err


def test_runs_without_results_are_listed_with_their_errors(clpet) -> None:
    done = write_runs()[0]
    for name, files in (("s3-a", {}), ("s4-a", {"failed.json": {"error": f"no memory for {HOSTILE}"}})):
        folder = done.parent / name
        folder.mkdir()
        for file, content in {"run.json": {}, **files}.items():
            (folder / file).write_text(json.dumps(content))
    clpet("report")
    page = html.unescape(Path("report.html").read_text("utf-8"))
    assert f"<li>{done.parent}/s3-a: stopped, or still running</li>" in page
    assert f"<li>{done.parent}/s4-a: failed: no memory for {HOSTILE}</li>" in page


def test_where_selects_runs(clpet) -> None:
    write_runs()
    assert clpet("report", "--where", "method=kif", "--where", "seed=0,1").out.startswith("report.html: 2 runs")
    assert "ewc" not in re.sub(r"<script>.*?</script>", "", Path("report.html").read_text("utf-8"), flags=re.S)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere is not a folder"),
        (["empty"], "empty has no finished runs"),
        (["--where", "method=slm"], "--where method=slm: no run has this value; method is one of ewc, kif"),
        (["--where", "methd=kif"], "--where methd=kif: give KEY=VALUE with an option of the runs"),
        (["--compare", "methd"], "no run has the option methd in its configuration; did you mean method?"),
        (["-o", "empty"], "empty is a folder: give the name of a file"),
        (["-o", "no/report.html"], "no is not a folder: create it, or give another file"),
    ],
)
def test_refusals_are_one_line(clpet, words: list[str], message: str) -> None:
    write_runs()
    Path("empty").mkdir()
    result = clpet("report", *words)
    assert result.code == 2
    assert message in result.err
    assert result.err.count("\n") == 1
    assert not Path("report.html").exists()


def test_a_damaged_file_of_predictions_is_one_line(clpet) -> None:
    folder = write_runs()[0]
    (folder / "predictions" / "after-002.parquet").write_bytes(b"PAR1")
    result = clpet("report")
    assert result.code == 2
    assert "after-002.parquet cannot be read" in result.err


def test_runs_of_plain_text_get_their_curves(clpet) -> None:
    """Perplexities over zero-shot by distance: 8 / 10 just after a domain, 9 / 10 one domain later, 1 before."""
    scores = [[10.0, 10.0], [8.0, 10.0], [9.0, 8.0]]
    write_run("sequential", objective="language_modeling", metric="perplexity", direction="lower", scores=scores,
              pretraining={"groups": {}})  # fmt: skip
    report = build_report("runs", find_runs(Path("outputs")), ["method"], [])
    chart = next(chart for chart in report.sections[0].charts if chart.title == "Transfer by distance")
    assert [(point["x"], point["y"]) for point in chart.points] == [(-1, 1.0), (0, 0.8), (1, 0.9)]


def test_reports_import_no_torch() -> None:
    modules = "clpet.cli.report, clpet.reporting.report.page, clpet.runs.recorded_texts, clpet.data.sources"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
