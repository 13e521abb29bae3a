"""`clpet runs --compare KEY --correlate X Y`: ranks by hand, the rows that count, the picture and the refusals."""

from pathlib import Path

import numpy as np
import pytest

from clpet.reporting.correlation import interval
from clpet.reporting.table_statistics import rank_correlation, ranks
from tests.reporting.test_comparison import write_run


def test_ranks_and_their_correlation_by_hand() -> None:
    """1 - 6 * 4 / (5 * 24) = 0.8; with a tie 4.5 / sqrt(4.5 * 5)."""
    assert ranks(np.array([3.0, 1, 1, 7])).tolist() == [3, 1.5, 1.5, 4]
    assert rank_correlation(np.array([1.0, 2, 3, 4, 5]), np.array([2.0, 1, 4, 3, 5])) == pytest.approx(0.8)
    assert rank_correlation(np.array([1.0, 2, 2, 3]), np.array([1.0, 20, 30, 40])) == pytest.approx(0.948683, abs=1e-6)
    assert rank_correlation([1.0, 1, 1], [1.0, 2, 3]) is None


def test_the_interval_of_a_perfect_order_is_one_point_and_covers_chance_otherwise() -> None:
    x = np.arange(8.0)
    assert interval(x, np.exp(x)) == pytest.approx((1, 1))
    low, high = interval(x, np.array([3.0, 1, 4, 1, 5, 9, 2, 6]))
    assert -1 <= low < (rank_correlation(x, np.array([3.0, 1, 4, 1, 5, 9, 2, 6])) or 0) < high <= 1


@pytest.mark.usefixtures("rendered")
def test_rows_are_correlated_over_the_means_of_their_seeds(clpet) -> None:
    """Drift rises with the average in three of four steps: ranks 1 2 3 5 4 against 1 2 3 4 5 give 1 - 6 * 2 / 120."""
    for index, drift in enumerate((0.1, 0.2, 0.3, 0.9, 0.4)):
        for seed in (0, 1):
            hits = {"a": [1] * (index + 1) + [0] * (9 - index), "b": [1, 0, 1, 1]}
            values = {
                "row": 2,
                "probe/cka": 0.5,
                "probe/weight_norm": drift * (1 + seed),
                "downstream/again/a/accuracy": 7.0,
            }
            write_run(f"m{index}", seed, hits, signature=f"m{index}", diagnostics=[{"row": 0}, values])
    write_run("given", task_id_at_test=True, signature="given", diagnostics=[{"row": 2, "probe/weight_norm": 1.0}])
    write_run("unprobed", signature="unprobed")
    words = ("runs", "--compare", "method", "--metrics", "average", "--correlate")
    answer = clpet(*words, "weight_norm", "average", "--picture", "points.png")
    assert answer.code == 0, answer.err
    assert "weight_norm and average over 5 rows: Spearman's rho +0.90, 95 % interval [" in answer.out
    assert "left out, since the task is given: given (task given)" in answer.out
    assert "left out, without weight_norm: unprobed" in answer.out
    assert Path("points.png").read_bytes()[:4] == b"\x89PNG"
    for case, message in (
        (("weight_nrm", "average"), "did you mean weight_norm?"),
        (("weight_norm", "average", "--format", "csv"), "only --format text and md"),
        (("weight_norm", "average", "--picture", "p.doc"), "must end in .png"),
    ):
        wrong = clpet(*words, *case)
        assert (wrong.code, message in wrong.err) == (2, True), wrong.err
    assert "needs --compare" in clpet("runs", "--correlate", "weight_norm", "average").err


def test_a_report_has_probes_and_downstream_tasks(clpet) -> None:
    name = "</script><b>task"
    for method, seed in (("ewc", 0), ("ewc", 1), ("kif", 0)):
        rows = [{"row": row, "probe/cka": 1 - row / 10, "probe/cka/block01": 0.5, f"downstream/{name}/acc": 0.25 + seed}
                for row in range(3)]  # fmt: skip
        write_run(method, seed, signature=method, diagnostics=rows)
    assert clpet("report", "outputs", "-o", "report.html").code == 0
    page = Path("report.html").read_text("utf-8")
    assert "Probes and downstream tasks" in page
    assert "CKA with the pretrained model" in page
    assert '<button type="button">downstream/&lt;/script&gt;&lt;b&gt;task/acc</button>' in page
    assert ">0.75<" in page  # the mean of 0.25 and 1.25
    assert "<b>task" not in page
    assert "block01" not in page
