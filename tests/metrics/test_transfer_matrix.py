"""Metrics of the transfer matrix against hand-computed numbers."""

from pathlib import Path

import numpy as np
import pytest

from clpet.metrics.transfer_matrix import CONVENTIONS, TransferMatrix
from clpet.runs.run_dir import transfer_csv


def matrix(rows: list[list[float]], direction: str = "higher") -> TransferMatrix:
    transfer = TransferMatrix([f"t{i + 1}" for i in range(len(rows[0]))], direction)
    transfer.scores = np.array(rows, dtype=float)
    return transfer


R = matrix([[10, 20, 30], [80, 25, 36], [70, 60, 40], [75, 50, 90]])


def test_average_is_the_mean_of_the_last_row() -> None:
    assert R.average() == pytest.approx((75 + 50 + 90) / 3)


def test_whole_and_average_differ_on_unbalanced_tasks() -> None:
    """90/100 and 1/2: whole 89.22, average 70.00 (oracle 17)."""
    transfer = TransferMatrix(["a", "b"])
    transfer.record(2, 0, 100 * 90 / 100, 90, 100)
    transfer.record(2, 1, 100 * 1 / 2, 1, 2)
    assert round(transfer.micro_average(), 2) == 89.22
    assert round(transfer.average(), 2) == 70.00


def test_whole_of_the_tacred_log() -> None:
    """2012/3325 = 60.51 % (oracle 17)."""
    transfer = TransferMatrix(["a"])
    transfer.record(1, 0, 0, 2012, 3325)
    assert round(transfer.micro_average(), 2) == 60.51


def test_backward_matrix_and_bwt() -> None:
    """B[i,j] = R[i,j] - R[j,j] for j < i; BWT is the mean of its last row."""
    expected = np.full((4, 3), np.nan)
    expected[2, 0], expected[3, 0], expected[3, 1] = -10, -5, -10
    np.testing.assert_array_equal(R.backward, expected)
    assert R.backward_transfer() == -7.5
    assert R.metrics()["bwt_sapt"] == pytest.approx(-5)  # the same sum over T instead of T - 1


def test_forward_matrix_and_fwt() -> None:
    """F[i,j] = R[i,j] - R[0,j] for j > i; FWT is the mean just right of the diagonal."""
    expected = np.full((4, 3), np.nan)
    expected[1, 1], expected[1, 2], expected[2, 2] = 5, 6, 10
    np.testing.assert_array_equal(R.forward, expected)
    assert R.forward_transfer() == 7.5


def test_forgetting_takes_the_best_earlier_row() -> None:
    """Task 1 fell from 80 to 75, task 2 from 60 to 50."""
    assert R.forgetting() == 7.5


def test_forgetting_of_kif_oracle_8() -> None:
    """R = [[80],[70,60],[75,50,90],[65,55,85,40]], s = [80,62,88,45]: AP 61.25, F.Ra 8.3333, BWT -8.3333 or -6.25."""
    nan = float("nan")
    transfer = matrix([[nan] * 4, [80, nan, nan, nan], [70, 60, nan, nan], [75, 50, 90, nan], [65, 55, 85, 40]])
    single = matrix([[nan] * 4] * 5)
    for index, value in enumerate([80, 62, 88, 45]):
        single.scores[index + 1, index] = value
    metrics = transfer.metrics(independent=single)
    assert metrics["average"] == 61.25
    assert metrics["forgetting"] == pytest.approx(8.33333, abs=1e-4)
    assert metrics["bwt"] == pytest.approx(-8.33333, abs=1e-4)
    assert metrics["bwt_sapt"] == -6.25
    assert metrics["fwt_single_task"] == -1.25
    assert metrics["fwt"] is None  # the rows above the diagonal were not measured


def test_average_incremental_is_the_mean_over_time() -> None:
    assert R.average_incremental() == pytest.approx((80 + 65 + 215 / 3) / 3)


def test_learning_accuracy_is_the_mean_of_the_diagonal() -> None:
    assert R.learning_accuracy() == pytest.approx((80 + 60 + 90) / 3)


def test_intransigence_is_the_mean_difference_to_joint_training() -> None:
    nan = float("nan")
    joint = matrix([[0, 0, 0], [nan] * 3, [nan] * 3, [85, 70, 91]])
    assert R.metrics(joint=joint)["intransigence"] == pytest.approx((5 + 10 + 1) / 3)


def test_reference_runs_are_matched_by_task_name() -> None:
    """A reference run in another order gives the same result."""
    nan = float("nan")
    joint = TransferMatrix(["t3", "t1", "t2"])
    joint.scores = np.array([[0, 0, 0], [nan] * 3, [nan] * 3, [91, 85, 70]])
    assert R.metrics(joint=joint)["intransigence"] == pytest.approx((5 + 10 + 1) / 3)


def test_lower_is_better_flips_the_sign_of_forgetting_only() -> None:
    """A perplexity that rises from 20 to 28 and from 18 to 27 means forgetting of 8 and 9."""
    transfer = matrix([[40, 30, 20], [20, 32, 22], [24, 18, 21], [28, 27, 15]], "lower")
    assert transfer.forgetting() == pytest.approx((28 - 20 + 27 - 18) / 2)
    assert transfer.backward_transfer() == pytest.approx((8 + 9) / 2)


def test_metrics_without_their_entries_are_none() -> None:
    transfer = matrix([[float("nan")] * 2, [float("nan")] * 2, [50, 60]])
    metrics = transfer.metrics()
    assert metrics["average"] == 55
    assert [name for name, value in metrics.items() if value is None] == [
        "whole", "average_incremental", "learning_accuracy", "bwt", "bwt_sapt", "fwt", "fwt_zero_shot", "fwt_single_task", "forgetting",
        "intransigence",
    ]  # fmt: skip


def test_a_single_task_has_no_transfer() -> None:
    assert matrix([[0], [90]]).metrics()["bwt"] is None


def test_every_metric_has_a_formula_and_is_documented() -> None:
    assert list(R.metrics()) == list(CONVENTIONS)
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    assert all(f"| {name} |" in page for name in CONVENTIONS)


def test_json_round_trip_is_exact() -> None:
    transfer = TransferMatrix(["a", "b"])
    transfer.record(1, 0, 100 / 3, 1, 3)
    loaded = TransferMatrix.from_json(transfer.to_json())
    for name in ("scores", "correct", "total"):
        np.testing.assert_array_equal(getattr(transfer, name), getattr(loaded, name))


def test_csv_has_rows_zero_to_t_and_empty_cells() -> None:
    transfer = matrix([[float("nan"), 0.5], [1, 2], [3, 100 / 3]])
    assert transfer_csv(transfer) == "after,t1,t2\n0,,0.5\n1,1.0,2.0\n2,3.0,33.333333333333336\n"
