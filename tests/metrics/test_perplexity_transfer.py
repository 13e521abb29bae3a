"""Figures of continual pretraining against hand-computed numbers, and against the numbers they are not."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from clpet.metrics.perplexity_transfer import FORMULAS, figures, headline, saturation

P = np.array([[40, 30, 20, 50], [20, 32, 22, 60], [24, 18, 21, 55], [30, 24, 10, 52], [28, 27, 15, 25]], dtype=float)
NAMES = ["d1", "d2", "d3", "d4"]
ALONE = np.array([21, 19, 12, 24], dtype=float)
FOUND = figures(P, NAMES, ALONE)


def mean(name: str, found: dict = FOUND) -> float:
    return found["average"][name]["mean"]


def test_averages_over_domains() -> None:
    assert (mean("zs"), mean("dapt"), mean("cpt"), mean("lc")) == (35.0, 19.0, 18.25, 23.75)
    assert [row["cpt"] for row in FOUND["domains"]] == [20, 18, 10, 25]
    assert mean("cpt_minus_dapt") == -0.75
    assert FOUND["average"]["cpt"]["median"] == 19
    assert FOUND["domains"][1] == {"domain": "d2", "zs": 30, "dapt": 19, "cpt": 18, "lc": 27, "fg": 9}


def test_forgetting_with_and_without_the_last_domain() -> None:
    assert mean("fg") == 5.5
    assert mean("fg_before_last") == pytest.approx(7.333333, abs=1e-6)
    assert FOUND["average"]["fg_before_last"]["median"] == 8


def test_backward_transfer_by_position() -> None:
    backward = FOUND["backward"]
    assert backward["after"] == [2, 3, 4]
    assert backward["perplexity"]["mean"] == pytest.approx([24, 27, 23.333333], abs=1e-6)
    assert backward["minus_zs"]["mean"] == pytest.approx([-16, -8, -6.666667], abs=1e-6)
    assert backward["minus_zs"]["median"][-1] == -5
    assert backward["over_zs"]["mean"] == pytest.approx([0.6, 0.775, 0.783333], abs=1e-6)
    assert backward["over_zs"]["mean"][1:] != pytest.approx([0.771429, 0.777778], abs=1e-3)  # the ratios of means


def test_forward_transfer_by_position() -> None:
    forward = FOUND["forward"]
    assert forward["after"] == [1, 2, 3]
    assert forward["perplexity"]["mean"] == [38, 38, 52]
    assert forward["minus_zs"]["mean"] == pytest.approx([4.666667, 3, 2], abs=1e-6)


def test_backward_transfer_by_age() -> None:
    age = FOUND["by_age"]
    assert (age["age"], age["count"]) == ([0, 1, 2, 3], [4, 3, 2, 1])
    assert age["minus_zs"]["mean"] == [-16.75, -9, -6.5, -12]
    assert age["minus_own"]["mean"] == [0, 5, 9.5, 8]


def test_forward_transfer_by_lead() -> None:
    lead = FOUND["by_lead"]
    assert (lead["lead"], lead["count"]) == ([1, 2, 3], [3, 2, 1])
    assert lead["minus_zs"]["mean"] == pytest.approx([1.666667, 3.5, 10], abs=1e-6)


def test_classic_transfer_on_perplexities_and_their_logs() -> None:
    classic = FOUND["classic"]
    assert classic["bwt"] == pytest.approx(7.333333, abs=1e-6)
    assert classic["fwt"] == pytest.approx(1.666667, abs=1e-6)
    assert classic["bwt_log"] == pytest.approx(0.382467, abs=1e-6)
    assert classic["fwt_log"] == pytest.approx(0.050850, abs=1e-6)


def test_one_number_each_for_a_comparison() -> None:
    found = headline(FOUND)
    assert list(found) == list(FORMULAS)
    assert found["backward"] == pytest.approx((-16 - 8 - 20 / 3) / 3)
    assert found["forward"] == pytest.approx((14 / 3 + 3 + 2) / 3)
    assert (found["cpt"], found["fg"], found["bwt"]) == (18.25, 5.5, mean("fg_before_last"))


def test_every_figure_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text().partition("**Perplexities.**")[2]
    assert all(f"| {name} |" in page for name in FORMULAS)


def test_identities_of_any_matrix() -> None:
    """Pairs, own checkpoints, and mean(LC - CPT) = FG = FG without the last * (N - 1) / N."""
    scores = np.random.default_rng(0).uniform(5, 90, (160, 159))
    found = figures(scores, [f"d{i}" for i in range(159)])
    assert sum(found["backward"]["count"]) == 12_561
    assert sum(found["by_age"]["count"]) == 12_720
    assert sum(found["by_age"]["count"]) + sum(found["by_lead"]["count"]) == 25_281
    assert found["by_age"]["perplexity"]["mean"][0] == pytest.approx(mean("cpt", found))
    assert mean("fg", found) == pytest.approx(mean("lc", found) - mean("cpt", found))
    assert mean("fg_before_last", found) * 158 == pytest.approx(mean("fg", found) * 159)
    assert found["domains"][-1]["fg"] == 0


def test_nothing_learned_is_no_transfer() -> None:
    """lr = 0: every row is row 0."""
    found = figures(np.tile([40.0, 30, 20], (4, 1)), ["a", "b", "c"])
    for name in ("backward", "by_age", "forward", "by_lead"):
        assert set(found[name]["minus_zs"]["mean"]) == {0}
        assert set(found[name]["over_zs"]["median"]) == {1}
    assert mean("fg", found) == mean("cpt_minus_zs", found) == 0
    assert set(found["classic"].values()) == {0}


def test_a_single_domain() -> None:
    found = figures(np.array([[40.0], [20.0]]), ["a"], np.array([20.0]))
    assert mean("lc", found) == mean("cpt", found) == mean("dapt", found) == 20
    assert found["average"]["fg_before_last"]["mean"] is None
    assert headline(found)["backward"] is None
    assert found["saturation"] == {name: {"mean": None, "median": None} for name in ("backward", "forward")}


def test_averages_do_not_depend_on_the_order() -> None:
    """Columns and rows of a matrix whose entries depend on the domain and the time alone, learned in another order."""
    rows = np.arange(5)[:, None]
    base = np.array([40.0, 30, 20, 50])
    averages = []
    for order in itertools.permutations(range(4)):
        found = figures(base[list(order)] / (1 + rows), [NAMES[j] for j in order], ALONE[list(order)])
        averages.append((mean("zs", found), mean("dapt", found), mean("lc", found), mean("lc_minus_dapt", found)))
    assert np.allclose(averages, averages[0])


def test_groups_of_domains_apart() -> None:
    """d1 and d3 in the same matrix: positions stay, other columns go."""
    found = figures(P, NAMES, ALONE, {"odd": ["d1", "d3"], "none": ["d9"]})
    assert {key: value for key, value in found.items() if key != "groups"} == {
        key: value for key, value in FOUND.items() if key != "groups"
    }
    assert list(found["groups"]) == ["odd"]
    odd = found["groups"]["odd"]
    assert (mean("zs", odd), mean("dapt", odd), mean("cpt", odd), mean("lc", odd)) == (30, 16.5, 15, 21.5)
    assert mean("fg", odd) == mean("fg_before_last", odd) == 6.5  # neither is the last domain
    assert odd["backward"]["minus_zs"]["mean"] == [-16, -10, -8.5]
    assert odd["backward"]["count"] == [1, 1, 2]
    assert odd["forward"]["minus_zs"]["mean"] == [2, 1, None]
    assert odd["classic"]["fwt"] == 1


def test_what_was_not_measured_is_left_out_or_none() -> None:
    """Every second checkpoint, with its diagonal: curves use what there is; an average needs all its entries."""
    scores = P.copy()
    scores[1, 1:] = scores[3, [0, 1, 3]] = np.nan
    found = figures(scores, NAMES)
    assert mean("lc", found) == 23.75
    assert mean("cpt", found) == 18.25
    assert found["backward"]["perplexity"]["mean"] == pytest.approx([24, None, 70 / 3])
    assert found["backward"]["count"] == [1, 0, 3]
    assert found["classic"]["fwt"] is None
    assert mean("dapt", found) is None
    scores[0] = np.nan
    assert mean("zs", figures(scores, NAMES)) is None
    assert figures(scores, NAMES)["by_age"]["minus_zs"]["mean"] == [None] * 4
    json.dumps(figures(scores, NAMES), allow_nan=False)


def test_saturation_is_where_a_curve_stays_near_its_median() -> None:
    """Median 0.7; 2 % of it is 0.014: 0.71 is near, 0.72 is not."""
    values = [0.9, 0.7, 0.8, 0.72, 0.71, 0.7, 0.695, 0.69, 0.7]
    curve = {"after": list(range(2, 11)), "over_zs": {"mean": values}}
    assert saturation(curve) == 6
    assert saturation(curve, epsilon=0.03) == 5
    curve["over_zs"]["mean"][-1] = 0.8
    assert saturation(curve) is None
