"""Reports of runs with perplexities: tables, comparisons with DAPT from another run, and figures."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from clpet.data.task_order import order_domains
from clpet.metrics.perplexity_transfer import figures
from clpet.metrics.transfer_matrix import TransferMatrix, tolist
from clpet.reporting.perplexity_tables import sparse_indices
from clpet.reporting.plots.run_figures import draw
from clpet.reporting.run_summary import show_finished
from clpet.reporting.tables import matrix_table, perplexity, summary_line

pytestmark = pytest.mark.usefixtures("rendered")
NAN = float("nan")
P = [[40, 30, 20, 50], [20, 32, 22, 60], [24, 18, 21, 55], [30, 24, 10, 52], [28, 27, 15, 25]]
ALONE = [[40, 30, 20, 50], [21, NAN, NAN, NAN], [NAN, 19, NAN, NAN], [NAN, NAN, 12, NAN], [NAN, NAN, NAN, 24]]
NAMES = ["law", "art", "sea", "sky"]
GROUPS = {"ground": ["law", "art"], "blue": ["sea", "sky"]}


def matrix_from(scores: list, names: list[str] = NAMES) -> TransferMatrix:
    matrix = TransferMatrix(list(names), "lower")
    matrix.scores = np.array(scores, dtype=float)
    return matrix


def write_run(method: str, scores: list, seed: int = 0, model: str = "tiny") -> Path:
    """Writes the folder of a finished run, with the files that comparisons read."""
    matrix = matrix_from(scores)
    cost = {"seconds": 1, "forward_examples": 1, "backward_examples": 1, "forward_tokens": 1, "peak_memory_mb": 1,
            "trainable_parameters": 1, "stored_parameters": 1, "replay_examples": 0}  # fmt: skip
    run = {
        "method": method, "benchmark": "domains", "model": model, "seed": seed, "replay": "none", "peft": "none",
        "objective": "language_modeling", "signature": f"{method}-{model}", "setting": model,
        "overrides": ["benchmark=domains"], "task_id_at_test": method == "dapt", **matrix.to_json(),
        "pretraining": figures(matrix.scores, NAMES, groups=GROUPS), "cost": [cost] * 4,
        "backward": tolist(matrix.backward), "task_scores": tolist(matrix.scores), "task_forward": tolist(matrix.forward),
        "average": 1, "backward_transfer": 1, "whole": 1, "forgetting": 1, "learning_accuracy": 1, "parameters": {"trainable": 1, "total": 1, "percent": 100},
        "diagnostics": [{"row": 4, "bits_per_byte/law": 1.25}],
    }  # fmt: skip
    folder = Path("outputs", "domains", method, f"s{seed}-{method}{model}")
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(run))
    (folder / "run.json").write_text(json.dumps({"config": {}}))
    return folder


def cells(text: str, first: str) -> list[str]:
    """The cells of the first line that starts with a word."""
    return next(line.split() for line in text.splitlines() if line.startswith(first))


def test_show_gives_domains_averages_and_transfer(clpet) -> None:
    run = write_run("sequential", P)
    before = clpet("show", run).out
    assert "perplexity after each domain (rows), lower is better" in before
    assert "accuracy" not in before
    assert cells(before, "art ") == ["art", "24.00", "18.00", "21.00", "55.00"]
    assert "domain     ZS    CPT     LC    FG  LC bits/byte" in before
    write_run("dapt", ALONE)
    printed = clpet("show", run).out
    assert "law     40.00  21.00  20.00  28.00  8.00         1.250" in printed
    assert cells(printed, "mean of all") == [
        "mean",
        "of",
        "all",
        "35.00",
        "19.00",
        "18.25",
        "23.75",
        "5.50",
        "7.33",
        "-0.75",
        "4.75",
    ]
    assert cells(printed, "median of ground")[3:5] == ["35.00", "20.00"]
    assert cells(printed, "3  ") == ["3", "1", "28.00", "28.00", "-12.00", "-12.00", "0.700", "8.00"]


def test_every_metric_has_its_formula_and_the_command_it_needs(clpet) -> None:
    run = write_run("sequential", P)
    printed = clpet("show", run, "--metrics").out
    assert "needs: clpet train method=dapt benchmark=domains" in printed
    assert cells(printed, "bwt_log")[1] == "0.38"
    assert cells(printed, "cpt ")[1] == "18.25"
    write_run("dapt", ALONE)
    assert "needs" not in clpet("show", run, "--metrics").out


def test_a_comparison_of_perplexities_has_its_own_columns(clpet) -> None:
    write_run("sequential", P)
    write_run("sequential", (np.array(P) + 2).tolist(), seed=1)
    for seed in (0, 1):
        write_run("dapt", ALONE, seed)
    printed = clpet("runs", "--compare", "method").out
    assert "domains: perplexity, lower is better, mean ± standard deviation over seeds" in printed
    assert cells(printed, "method") == ["method", "seeds", "zs", "dapt", "cpt", "lc", "fg", "backward", "forward"]
    row = next(line for line in printed.splitlines() if line.startswith("sequential"))
    assert row.split("  ")[-7:] == ["36.00 ± 1.41", "19.00 ± 0.00", "19.25 ± 1.41", "24.75 ± 1.41", "5.50 ± 0.00",
                                    "-10.22 ± 0.00", "3.22 ± 0.00"]  # fmt: skip
    assert "bootstrap" not in printed
    chosen = clpet("runs", "--compare", "method", "--metrics", "fwt_log,cpt_minus_dapt").out
    assert cells(chosen, "method")[2:] == ["fwt_log", "cpt_minus_dapt"]
    wrong = clpet("runs", "--compare", "method", "--metrics", "cpd")
    assert (wrong.code, "did you mean cpt?" in wrong.err) == (2, True)


def test_models_are_compared_in_a_figure(clpet, tmp_path: Path) -> None:
    for model, factor in (("small", 2), ("large", 1)):
        write_run("sequential", (factor * np.array(P)).tolist(), model=model)
        write_run("dapt", (factor * np.array(ALONE)).tolist(), model=model)
    answer = clpet("runs", "--compare", "model", "--picture", "models.png")
    assert (answer.code, answer.err) == (0, "")
    assert (tmp_path / "models.png").read_bytes().startswith(b"\x89PNG")
    assert "--compare KEY" in clpet("runs", "--picture", "models.png").err
    refused = clpet("runs", "--compare", "model", "--benchmark", "domains", "--picture", "no/folder.png")
    assert refused.code == 2


def test_the_figure_needs_one_benchmark(clpet) -> None:
    write_run("sequential", P)
    run = write_run("sequential", P, seed=1)
    record = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps({**record, "benchmark": "fewrel"}))
    answer = clpet("runs", "--compare", "model", "--picture", "models.png", "--metrics", "average")
    assert (answer.code, "draws one table, but there are 2" in answer.err) == (2, True)


def test_the_end_of_a_run_reports_perplexity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    results = json.loads((write_run("sequential", P) / "results.json").read_text())
    text = io.StringIO()
    show_finished(Console(file=text, width=200), tmp_path, results)
    printed = text.getvalue()
    assert "sequential on domains, seed 0: perplexity after each domain (rows), lower is better" in printed
    assert "in %" not in printed
    assert "accuracy" not in printed
    assert cells(printed, "mean of all")[3:6] == ["35.00", "18.25", "23.75"]
    assert "clpet train method=dapt benchmark=domains" in printed


def test_a_run_draws_matrix_domains_transfer_and_order(tmp_path: Path) -> None:
    texts = {name: [f"{name} and {other}" for other in NAMES] for name in NAMES}
    record = order_domains(texts, "similar", encoder="hashed", reference=["the law"]).record()
    for order, names in ((None, ["transfer", "domains", "transfer_curves"]),
                         (record, ["transfer", "domains", "transfer_curves", "order"])):  # fmt: skip
        paths = draw(tmp_path, matrix_from(P), "sequential on domains", order)
        assert paths == [tmp_path / f"{name}.png" for name in names]
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


@pytest.mark.parametrize("scores", [
    [[40], [20]],
    [[NAN, NAN], [20, NAN], [NAN, 30]],
    [[40, 50], [float("inf"), NAN], [20, 30]],
    np.random.default_rng(0).uniform(5, 90, (41, 40)).tolist(),
])  # fmt: skip
def test_figures_of_unusual_matrices(scores: list, tmp_path: Path) -> None:
    """One domain, unmeasured cells, an infinite perplexity, many domains."""
    matrix = matrix_from(scores, [f"d{i}" for i in range(len(scores[0]))])
    assert len(draw(tmp_path, matrix, "sequential on domains")) == 3


def test_perplexities_are_printed_with_three_to_five_digits() -> None:
    assert [perplexity(x) for x in (6.842, 99.999, 129.93, 50257, -12, None, NAN)] == [
        "6.84", "100.00", "129.9", "50,257", "-12.00", "-", "-",
    ]  # fmt: skip


def test_the_middle_of_a_large_matrix_is_left_out() -> None:
    matrix = matrix_from(np.full((41, 40), 7.0).tolist(), [f"d{i}" for i in range(40)])
    header, *body = matrix_table(matrix).splitlines()
    assert header.split()[3:] == [f"d{i}" for i in range(8)] + ["…"] + [f"d{i}" for i in range(32, 40)]
    assert [line.split()[0] for line in body] == [
        "(before)",
        *[f"d{i}" for i in range(7)],
        "…",
        *[f"d{i}" for i in range(32, 40)],
    ]
    assert len(matrix_table(matrix_from(P)).splitlines()) == 6


def test_the_summary_line_after_a_domain() -> None:
    assert summary_line(matrix_from(P), 2) == "perplexity: average 21.00 · whole - on 2 seen domains"


def test_a_long_curve_is_printed_at_sparse_indices() -> None:
    assert sparse_indices(4) == [0, 1, 2, 3]
    assert sparse_indices(1) == [0]
    assert sparse_indices(0) == []
    indices = sparse_indices(159)
    assert (indices[:7], indices[-1]) == ([0, 1, 2, 3, 4, 5, 6], 158)
    assert len(indices) < 25
