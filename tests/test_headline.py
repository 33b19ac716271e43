import json
from dataclasses import fields, replace

import numpy as np
import pytest

from dynprune.evaluation.curves import BudgetCurve, BudgetPoint
from dynprune.evaluation.headline import Headline, headline, write_headline
from dynprune.evaluation.statistics import Interval, mean_interval

KEYS = [
    "accuracy_kept_at_10",
    "accuracy_kept_at_18",
    "router_minus_static",
    "preference_minus_fbc",
    "gap_closed",
    "measured_over_nominal",
    "preference_accuracy",
    "context_aware_gain",
    "lossless_speedup",
    "n_test",
    "seeds",
]


def first(count):
    """The first queries of 100 are right."""
    return np.array([1.0] * count + [0.0] * (100 - count))


def curve(name, right_at, cost=0.0, measured=0.9):
    points = [
        BudgetPoint(layers, (layers - cost) / 30, measured and measured * (layers - cost) / 30, first(right))
        for layers, right in right_at.items()
    ]
    return BudgetCurve(name, points)


# At 18% a router has 6.4 pruned layers: right are 45 of 100 here, 40 with FBC, 34 with static sets, 64 with the oracle.
CURVES = {
    "router": curve("router-dpo", {3.4: 53, 4.4: 50, 8.4: 40}, cost=1.0),
    "static": curve("static", {4.4: 40, 8.4: 28}),
    "oracle": curve("oracle", {4.4: 70, 8.4: 58}, measured=None),
    "preference": curve("router-dpo", {3.4: 53, 4.4: 50, 8.4: 40}, cost=1.0),
    "fbc": curve("router-fbc", {2.4: 50, 10.4: 30}, cost=1.0),
}


def figures(**changes):
    return headline(first(50), **(CURVES | {"seeds": 3} | changes))


def test_figures_are_those_computed_by_hand():
    result = figures(preference_accuracy=0.77, context_aware_gain=0.12, lossless_speedup=1.4)
    # At 10% there are 4 pruned layers: 3/5 of the way from 53 to 50.
    assert result.accuracy_kept_at_10 == pytest.approx((53 - 0.6 * 3) / 50)
    assert result.accuracy_kept_at_18 == pytest.approx(45 / 50)
    assert result.router_minus_static.mean == pytest.approx(0.45 - 0.34)
    assert result.preference_minus_fbc.mean == pytest.approx(0.45 - 0.40)
    assert result.gap_closed == pytest.approx((45 - 34) / (64 - 34))
    assert result.measured_over_nominal == pytest.approx(0.9)
    assert (result.preference_accuracy, result.context_aware_gain, result.lossless_speedup) == (0.77, 0.12, 1.4)
    assert (result.n_test, result.seeds) == (100, 3)


def test_differences_have_the_intervals_of_the_interpolated_scores_by_query():
    result = figures()
    expected = mean_interval((first(50) + first(40)) / 2 - (first(40) + first(28)) / 2)
    assert (result.router_minus_static.low, result.router_minus_static.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        ({"router": curve("router-dpo", {4.4: 50, 8.4: 40}, cost=1.0)}, {"accuracy_kept_at_10"}),
        (
            {"router": curve("router-dpo", {3.4: 53, 5: 48}, cost=1.0)},
            {"accuracy_kept_at_18", "router_minus_static", "gap_closed", "measured_over_nominal"},
        ),
        ({"router": curve("router-dpo", {3.4: 53, 8.4: 40}, cost=1.0, measured=None)}, {"measured_over_nominal"}),
        ({"static": curve("static", {2: 50, 6: 40})}, {"router_minus_static", "gap_closed"}),
        ({"oracle": curve("oracle", {8.4: 58})}, {"gap_closed"}),
        ({"oracle": CURVES["static"]}, {"gap_closed"}),
        ({"fbc": curve("router-fbc", {3: 50}, cost=1.0)}, {"preference_minus_fbc"}),
    ],
)
def test_a_figure_whose_curves_do_not_reach_is_absent_and_the_others_stay(changes, absent):
    result = figures(preference_accuracy=0.7, context_aware_gain=0.1, lossless_speedup=1.3, **changes)
    assert {name for name in KEYS if getattr(result, name) is None} == absent


def test_nothing_is_kept_of_an_slm_that_is_never_right():
    result = headline(np.zeros(100), **CURVES, seeds=1)
    assert (result.accuracy_kept_at_10, result.accuracy_kept_at_18) == (None, None)


def test_curves_of_other_queries_are_refused_by_name():
    short = BudgetCurve("router-fbc", [BudgetPoint(6, 0.2, None, np.ones(3))])
    with pytest.raises(ValueError, match="the unpruned SLM has 100 and router-fbc 3"):
        figures(fbc=short)


@pytest.mark.parametrize(
    "wrong", [{"preference_accuracy": float("nan")}, {"router_minus_static": Interval(0.1, 0.0, float("inf"))}]
)
def test_figures_that_json_does_not_know_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"headline's {next(iter(wrong))} is "):
        replace(figures(), **wrong)


def test_the_file_has_the_published_keys_and_null_for_what_was_not_measured(tmp_path):
    assert [field.name for field in fields(Headline)] == KEYS
    write_headline(figures(lossless_speedup=1.4), tmp_path / "main" / "figures.json")
    document = json.loads((tmp_path / "main" / "figures.json").read_text())
    assert list(document) == KEYS
    assert set(document["router_minus_static"]) == set(document["preference_minus_fbc"]) == {"mean", "low", "high"}
    assert (document["lossless_speedup"], document["preference_accuracy"], document["n_test"]) == (1.4, None, 100)
    assert [path.name for path in (tmp_path / "main").iterdir()] == ["figures.json"]
