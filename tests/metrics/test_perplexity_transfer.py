"""Transfer of perplexities against hand-computed numbers, and against common mistakes."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from clpet.metrics.perplexity_transfer import FORMULAS, figures, headline, saturation

PERPLEXITIES = np.array(
    [[40, 30, 20, 50], [20, 32, 22, 60], [24, 18, 21, 55], [30, 24, 10, 52], [28, 27, 15, 25]], dtype=float
)
NAMES = ["d1", "d2", "d3", "d4"]
DAPT = np.array([21, 19, 12, 24], dtype=float)
TRANSFER = figures(PERPLEXITIES, NAMES, DAPT)


def mean(name: str, transfer: dict = TRANSFER) -> float:
    return transfer["average"][name]["mean"]


def test_averages_over_domains() -> None:
    assert (mean("zs"), mean("dapt"), mean("cpt"), mean("lc")) == (35.0, 19.0, 18.25, 23.75)
    assert [row["cpt"] for row in TRANSFER["domains"]] == [20, 18, 10, 25]
    assert mean("cpt_minus_dapt") == -0.75
    assert TRANSFER["average"]["cpt"]["median"] == 19
    assert TRANSFER["domains"][1] == {"domain": "d2", "zs": 30, "dapt": 19, "cpt": 18, "lc": 27, "fg": 9}


def test_forgetting_with_and_without_the_last_domain() -> None:
    assert mean("fg") == 5.5
    assert mean("fg_before_last") == pytest.approx(7.333333, abs=1e-6)
    assert TRANSFER["average"]["fg_before_last"]["median"] == 8


def test_backward_transfer_by_position() -> None:
    backward = TRANSFER["backward"]
    assert backward["after"] == [2, 3, 4]
    assert backward["perplexity"]["mean"] == pytest.approx([24, 27, 23.333333], abs=1e-6)
    assert backward["minus_zs"]["mean"] == pytest.approx([-16, -8, -6.666667], abs=1e-6)
    assert backward["minus_zs"]["median"][-1] == -5
    assert backward["over_zs"]["mean"] == pytest.approx([0.6, 0.775, 0.783333], abs=1e-6)
    assert backward["over_zs"]["mean"][1:] != pytest.approx([0.771429, 0.777778], abs=1e-3)  # the ratios of means


def test_forward_transfer_by_position() -> None:
    forward = TRANSFER["forward"]
    assert forward["after"] == [1, 2, 3]
    assert forward["perplexity"]["mean"] == [38, 38, 52]
    assert forward["minus_zs"]["mean"] == pytest.approx([4.666667, 3, 2], abs=1e-6)


def test_backward_transfer_by_age() -> None:
    age = TRANSFER["by_age"]
    assert (age["age"], age["count"]) == ([0, 1, 2, 3], [4, 3, 2, 1])
    assert age["minus_zs"]["mean"] == [-16.75, -9, -6.5, -12]
    assert age["minus_own"]["mean"] == [0, 5, 9.5, 8]


def test_forward_transfer_by_lead() -> None:
    lead = TRANSFER["by_lead"]
    assert (lead["lead"], lead["count"]) == ([1, 2, 3], [3, 2, 1])
    assert lead["minus_zs"]["mean"] == pytest.approx([1.666667, 3.5, 10], abs=1e-6)


def test_classic_transfer_on_perplexities_and_their_logs() -> None:
    classic = TRANSFER["classic"]
    assert classic["bwt"] == pytest.approx(7.333333, abs=1e-6)
    assert classic["fwt"] == pytest.approx(1.666667, abs=1e-6)
    assert classic["bwt_log"] == pytest.approx(0.382467, abs=1e-6)
    assert classic["fwt_log"] == pytest.approx(0.050850, abs=1e-6)


def test_headline_metrics() -> None:
    metrics = headline(TRANSFER)
    assert list(metrics) == list(FORMULAS)
    assert metrics["backward"] == pytest.approx((-16 - 8 - 20 / 3) / 3)
    assert metrics["forward"] == pytest.approx((14 / 3 + 3 + 2) / 3)
    assert (metrics["cpt"], metrics["fg"], metrics["bwt"]) == (18.25, 5.5, mean("fg_before_last"))


def test_every_metric_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text().partition("**Perplexities.**")[2]
    assert all(f"| {name} |" in page for name in FORMULAS)


def test_identities_that_hold_for_every_matrix() -> None:
    """Numbers of pairs, and mean(LC - CPT) = FG = FG without the last domain * (N - 1) / N."""
    scores = np.random.default_rng(0).uniform(5, 90, (160, 159))
    transfer = figures(scores, [f"d{i}" for i in range(159)])
    assert sum(transfer["backward"]["count"]) == 12_561
    assert sum(transfer["by_age"]["count"]) == 12_720
    assert sum(transfer["by_age"]["count"]) + sum(transfer["by_lead"]["count"]) == 25_281
    assert transfer["by_age"]["perplexity"]["mean"][0] == pytest.approx(mean("cpt", transfer))
    assert mean("fg", transfer) == pytest.approx(mean("lc", transfer) - mean("cpt", transfer))
    assert mean("fg_before_last", transfer) * 158 == pytest.approx(mean("fg", transfer) * 159)
    assert transfer["domains"][-1]["fg"] == 0


def test_transfer_is_zero_if_nothing_is_learned() -> None:
    """With lr = 0 every row equals row 0."""
    transfer = figures(np.tile([40.0, 30, 20], (4, 1)), ["a", "b", "c"])
    for name in ("backward", "by_age", "forward", "by_lead"):
        assert set(transfer[name]["minus_zs"]["mean"]) == {0}
        assert set(transfer[name]["over_zs"]["median"]) == {1}
    assert mean("fg", transfer) == mean("cpt_minus_zs", transfer) == 0
    assert set(transfer["classic"].values()) == {0}


def test_a_single_domain() -> None:
    transfer = figures(np.array([[40.0], [20.0]]), ["a"], np.array([20.0]))
    assert mean("lc", transfer) == mean("cpt", transfer) == mean("dapt", transfer) == 20
    assert transfer["average"]["fg_before_last"]["mean"] is None
    assert headline(transfer)["backward"] is None
    assert transfer["saturation"] == {name: {"mean": None, "median": None} for name in ("backward", "forward")}


def test_averages_do_not_depend_on_the_order() -> None:
    """Permutes domains in a matrix whose entries depend only on the domain and the number of tasks learned."""
    rows = np.arange(5)[:, None]
    base = np.array([40.0, 30, 20, 50])
    averages = []
    for order in itertools.permutations(range(4)):
        transfer = figures(base[list(order)] / (1 + rows), [NAMES[j] for j in order], DAPT[list(order)])
        averages.append(
            (mean("zs", transfer), mean("dapt", transfer), mean("lc", transfer), mean("lc_minus_dapt", transfer))
        )
    assert np.allclose(averages, averages[0])


def test_transfer_within_a_group_of_domains() -> None:
    """Only the columns of d1 and d3 count, at their positions in the full order."""
    transfer = figures(PERPLEXITIES, NAMES, DAPT, {"odd": ["d1", "d3"], "none": ["d9"]})
    assert {key: value for key, value in transfer.items() if key != "groups"} == {
        key: value for key, value in TRANSFER.items() if key != "groups"
    }
    assert list(transfer["groups"]) == ["odd"]
    odd = transfer["groups"]["odd"]
    assert (mean("zs", odd), mean("dapt", odd), mean("cpt", odd), mean("lc", odd)) == (30, 16.5, 15, 21.5)
    assert mean("fg", odd) == mean("fg_before_last", odd) == 6.5  # neither is the last domain
    assert odd["backward"]["minus_zs"]["mean"] == [-16, -10, -8.5]
    assert odd["backward"]["count"] == [1, 1, 2]
    assert odd["forward"]["minus_zs"]["mean"] == [2, 1, None]
    assert odd["classic"]["fwt"] == 1


def test_missing_entries_are_left_out_of_curves_and_make_averages_none() -> None:
    """Every second checkpoint is measured: curves use the entries that exist; an average needs all of its entries."""
    scores = PERPLEXITIES.copy()
    scores[1, 1:] = scores[3, [0, 1, 3]] = np.nan
    transfer = figures(scores, NAMES)
    assert mean("lc", transfer) == 23.75
    assert mean("cpt", transfer) == 18.25
    assert transfer["backward"]["perplexity"]["mean"] == pytest.approx([24, None, 70 / 3])
    assert transfer["backward"]["count"] == [1, 0, 3]
    assert transfer["classic"]["fwt"] is None
    assert mean("dapt", transfer) is None
    scores[0] = np.nan
    assert mean("zs", figures(scores, NAMES)) is None
    assert figures(scores, NAMES)["by_age"]["minus_zs"]["mean"] == [None] * 4
    json.dumps(figures(scores, NAMES), allow_nan=False)


def test_saturation_is_the_step_after_which_a_curve_stays_near_its_median() -> None:
    """Median 0.7; 2 % of it is 0.014: 0.71 is near, 0.72 is not."""
    values = [0.9, 0.7, 0.8, 0.72, 0.71, 0.7, 0.695, 0.69, 0.7]
    curve = {"after": list(range(2, 11)), "over_zs": {"mean": values}}
    assert saturation(curve) == 6
    assert saturation(curve, epsilon=0.03) == 5
    curve["over_zs"]["mean"][-1] = 0.8
    assert saturation(curve) is None
