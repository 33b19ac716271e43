"""From rows to the budget curves of their methods."""

import numpy as np
import pytest

from dynprune.evaluation.accuracy import Sample
from dynprune.evaluation.statistics import Interval, MedianInterval
from dynprune.evaluation.table import SCORES, TableRow
from dynprune.slm.speculative import Drafting
from dynprune.stages.budgets import budget_curves
from dynprune.stages.evaluate import Evaluation
from dynprune.stages.rows import ORIGINAL, Row

DRAFTING = Drafting(lookup=True, draft_tokens=3, min_probability=0.5)


def samples(layers: int, correct: list[int]) -> list[Sample]:
    return [Sample(str(i), tuple(range(layers)), "", (), False, {"ast_match": float(c)}) for i, c in enumerate(correct)]


def table_row(name: str, layers: float, nominal: float, measured: float | None) -> TableRow:
    scores = dict.fromkeys(SCORES, Interval(0, 0, 0))
    speedup = None if measured is None else MedianInterval(measured, measured, measured)
    return TableRow(name, 4, scores, layers, nominal, measured_speedup=speedup)


def row(name: str, **settings) -> Row:
    return Row(name, lambda query: (), name, **settings)


# Name, layers, nominal and measured speedup, right answers.
GIVEN = [
    (ORIGINAL, 0, 0.0, 0.0, [1, 1, 1, 0]),
    (row("static-1", curve="static"), 1, 0.25, 0.2, [1, 1, 0, 0]),
    (row("static-2", curve="static"), 2, 0.5, 0.4, [1, 0, 0, 0]),
    (row("static-2-other"), 2, 0.5, None, [0, 0, 0, 0]),
    (row("router-fbc-s0", router_layers=1.0, seed=0), 1, 0.0, 0.1, [0, 0, 0, 0]),
    (row("router-fbc-s0@0", router_layers=1.0, curve="router-fbc", seed=0), 1, 0.0, -0.1, [1, 1, 1, 1]),
    (row("router-fbc-s0@0.25", router_layers=1.0, curve="router-fbc", seed=0), 2, 0.25, 0.15, [1, 1, 0, 1]),
    (row("router-fbc-s1@0", router_layers=1.0, curve="router-fbc", seed=1, timed=False), 1, 0.0, None, [1, 0, 1, 1]),
    (row("router-fbc-s1@0.25", router_layers=1.0, curve="router-fbc", seed=1, timed=False), 2, 0.25, None, [0, 1, 0, 1]),
    (row("lossless-lookup", drafting=DRAFTING), 0, 0.0, 0.5, [1, 1, 1, 0]),
]


@pytest.fixture
def curves():
    rows = [entry[0] for entry in GIVEN]
    said = {entry[0].name: samples(entry[1], entry[4]) for entry in GIVEN}
    table = [table_row(entry[0].name, *entry[1:4]) for entry in GIVEN]
    return budget_curves(Evaluation([], [], rows, said, [], {}), table)


def test_only_methods_with_budgets_have_curves(curves):
    assert set(curves) == {"static", "router-fbc"}


def test_what_pays_for_no_router_has_the_unpruned_slm_as_a_point(curves):
    points = curves["static"].points
    assert [(p.mean_pruned_layers, p.nominal_speedup, p.measured_speedup) for p in points] == [
        (0, 0, 0),
        (1, 0.25, 0.2),
        (2, 0.5, 0.4),
    ]
    assert [p.correct_N.tolist() for p in points] == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]


def test_seeds_are_averaged_budget_by_budget_and_have_the_times_of_the_one_that_is_timed(curves):
    points = curves["router-fbc"].points
    assert [p.measured_speedup for p in points] == pytest.approx([-0.1, 0.15])
    np.testing.assert_allclose([p.correct_N for p in points], [[1, 0.5, 1, 1], [0.5, 1, 0, 1]])


def test_seeds_that_prune_other_numbers_of_layers_do_not_share_times():
    given = [*GIVEN[:-2], (GIVEN[-2][0], 3, 0.5, None, [0, 1, 0, 1])]
    said = {entry[0].name: samples(entry[1], entry[4]) for entry in given}
    table = [table_row(entry[0].name, *entry[1:4]) for entry in given]
    curves = budget_curves(Evaluation([], [], [entry[0] for entry in given], said, [], {}), table)
    assert [p.measured_speedup for p in curves["router-fbc"].points] == [None, None]


def test_a_name_without_its_seed_is_what_averages_are_compared_by():
    assert row("router-fbc-s1@0.25", seed=1).over_seeds == "router-fbc@0.25"
    assert row("router-fbc@0.25").over_seeds == "router-fbc@0.25"
    # Only the seed goes: a method may be called alike.
    assert row("router-x-s1-s1@0", seed=1).over_seeds == "router-x-s1@0"
