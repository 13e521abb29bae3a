"""docs/results.md and docs/failures.md: written from the committed tables, with conclusions computed by hand here."""

from pathlib import Path

import pytest

from clpet.config.table_spec import Published, Row, TableSpec
from clpet.reporting.result_table import ResultTable
from clpet.reporting.table_row import TableRow
from scripts import claims, conclusions, results_page
from scripts.conclusions import Committed

ROOT = Path(__file__).resolve().parents[2]
RUNS = [(0, 0), (0, 1), (1, 0), (1, 1)]


def row(name: str, averages: list[float], kept: float, examples: float = 0, **more: object) -> TableRow:
    """A row with four runs, 10 points better on own labels, and what it keeps in bytes."""
    values = {
        key: {"average": value, "task_average": value + 10, "forgetting": 5.0, "stored_bytes": kept, "replay_bytes": examples,
              "trained_parameters": 0.0 if name == "ncm" else 9.0, "seconds": 1.0}
        for key, value in zip(RUNS, averages, strict=True)
    }  # fmt: skip
    return TableRow(name, more.pop("chosen", []), more.pop("trials", []), values, num_runs=4, total_seconds=900, **more)


@pytest.fixture(scope="module")
def item(tmp_path_factory: pytest.TempPathFactory) -> Committed:
    """A table whose rows were written to files and read again."""
    trials = [(["train.lr=1"], 41.25), (["train.lr=2"], 44.0)]
    rows = [
        row("ncm", [50, 50, 52, 52], 1000),
        row("sequential", [40, 42, 41, 43], 2000, trials=trials, chosen=["train.lr=2"],
            defaults={(0, 0): {"average": 38.0}, (0, 1): {"average": 39.0}}),
        row("replay", [60, 61, 62, 63], 3000, 5000),
        row("ewc", [40, 43, 40, 45], 6000),
        row("slm", [45, 46, 44, 47], 9000),
        row("joint", [70, 71, 70, 71], 0, all_at_once=True),
    ]  # fmt: skip
    spec = TableSpec(
        "T", ["benchmark=x", "benchmark.shots=30"], {item.name: Row() for item in rows}, {}, [0, 1], ["", "o"]
    )
    spec.rows["slm"].published = Published(79.1, "a paper", "BERT")
    folder = tmp_path_factory.mktemp("results")
    ResultTable("T", "cpu", {}, rows).write(folder, with_table=False)
    return Committed("python_stdlib", "cpu", spec, ResultTable.read(spec, "cpu", folder))


def test_the_committed_pages_are_those_of_the_script() -> None:
    for name, page in results_page.pages().items():
        assert (ROOT / "docs" / name).read_text() == page, "run `python -m scripts.results_page`"


def test_conclusions_by_hand(item: Committed) -> None:
    # Of those that keep more than ncm (1 kB) only replay, with 8 kB, is better. Means 51 and 61.5, deviations 1.1547
    # and 1.2910; half widths 3.182446 / 2 times that. joint keeps nothing, but is not a method.
    assert [line.split(" | ")[2:] for line in conclusions.memory([item]).splitlines()[2:]] == [
        ["1 kB", "0 kB", "`ncm`", "51.00 [49.16, 52.84] |"],
        ["8 kB", "5 kB", "`replay`", "61.50 [59.45, 63.55] |"],
    ]
    assert conclusions.labels_per(item.spec) == "at most 30 training texts of every label"
    # replay minus ncm: 10, 11, 10, 11, mean 10.5, deviation 0.5774; minus joint: -10, -10, -8, -8, deviation 1.1547.
    lines = {cells[2]: cells[3:] for cells in conclusions.winner(item)}
    assert lines["`ncm`"] == ["+10.50 [+9.58, +11.42]", "< 0.001"]
    assert lines["`joint`"] == ["-9.00 [-10.84, -7.16]", "< 0.001"]
    (first, over_ncm) = conclusions.replay_or_not(item)
    assert "`replay` (61.50 [59.45, 63.55]), the best one without `ncm`" in first
    assert "1 are above `ncm`, which trains nothing (`replay`), 3 are below" in over_ncm
    assert "the mean over the 5 rows is +10.00" in next(conclusions.task_id(item))
    # Tuned minus default: 2 and 3; mean 2.5, deviation 0.7071, half width 12.7062 * 0.5.
    assert "`sequential` +2.50 [-3.85, +8.85]" in next(conclusions.tuning(item))
    assert next(conclusions.headline(item)).startswith(
        "**python_stdlib, budget cpu** (at most 30 training texts of every label): `replay` is"
    )


@pytest.mark.parametrize(
    ("tests", "result"),
    [
        (["replay > sequential", "replay > ewc"], claims.HOLDS),
        (["sequential > replay"], claims.REFUTED),
        (["ewc > sequential"], claims.OPEN),  # 0, 1, -1, 2: mean 0.5, p 0.495
        (["replay > sequential", "ewc > sequential"], claims.OPEN),
        (["replay > sequential", "ncm > replay"], claims.REFUTED),
        (["ewc ~ sequential 3"], claims.HOLDS),  # 0.5 ± 2.05
        (["ewc ~ sequential 2"], claims.OPEN),
        (["replay ~ sequential 2"], claims.REFUTED),
        (["replay > kif"], claims.UNMEASURED),
        (["replay > kif", "replay > ncm"], claims.OPEN),
        (["replay > kif", "ncm > replay"], claims.REFUTED),
    ],
)  # fmt: skip
def test_verdicts_of_claims(item: Committed, tests: list[str], result: str) -> None:
    text = claims.section([item], [claims.Claim("P", "C.", "table 1", "python_stdlib", tests=tests)])
    assert f"**{result[0].upper()}{result[1:]}.**" in text


def test_a_verdict_by_hand_counts_until_a_test_is_measured(item: Committed) -> None:
    def text(test: str, table: str) -> str:
        return claims.section([item], [claims.Claim("P", "C.", "s", table, tests=[test], verdict=claims.HOLDS)])

    assert "Of 1 claims: 1 hold, 0 do not hold, 0 undecided at this size, 0 not measured here." in text(
        "replay > kif", "python_stdlib"
    )
    assert "**Holds, without a test.** Not measured: `replay > kif`." in text("replay > kif", "python_stdlib")
    assert "**Does not hold.** python_stdlib, budget cpu" in text("sequential > replay", "python_stdlib/cpu")
    assert "**Holds, without a test.**" in text("sequential > replay", "python_stdlib/orders")


def test_the_p_values_of_claims_are_corrected_over_all_of_them(item: Committed) -> None:
    # ncm - slm: 5, 4, 8, 5: mean 5.5, deviation 1.7321, t 6.351, p 0.00791; the other p is 0.495, so doubled: 0.0158.
    both = [claims.Claim("P", "A.", "s", "python_stdlib", tests=[test]) for test in ("ncm > slm", "ewc > sequential")]
    assert "p 0.008" in claims.section([item], both[:1])
    assert "p 0.016" in claims.section([item], both)


def test_claims_of_the_file_can_be_read_and_bad_ones_cannot(tmp_path: Path) -> None:
    assert len(claims.read_claims()) >= 25
    for wrong in ("tests: [a is b]", "metric: colour", "verdict: perhaps"):
        (tmp_path / "claims.yaml").write_text(f"- {{paper: P, claim: C, source: s, {wrong}}}\n")
        with pytest.raises(ValueError, match="C"):
            claims.read_claims(tmp_path / "claims.yaml")


def test_a_table_and_its_failures_by_hand(item: Committed) -> None:
    section = results_page.table_section(item)
    assert "24 runs with 1.5 hours" in section
    assert "| sequential (train.lr=2) | 41.50 [39.45, 43.55] |" in section
    assert "| `slm` | 45.50 | 79.1 | -33.60 | a paper | BERT |" in section
    page = results_page.failures_page([item])
    assert "| `ewc` | 42.00 [38.10, 45.90] | +0.50 [-1.55, +2.55] | defaults only |" in page
    assert "| `slm` | 45.50 | 79.1 | a paper | BERT |" in page  # 33.6 points below, but above sequential
    assert "| `replay` |" not in page
    assert results_page.tried(item.row("sequential")) == "train.lr=1: 41.2, **train.lr=2: 44.0**"
