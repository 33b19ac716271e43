import json
import math
from dataclasses import asdict

import pytest

from dynprune.data.rollouts import Likelihood, Rollout
from dynprune.exploration.statistics import ExplorationStatistics, SizeStatistics, exploration_statistics, statistics_lines

# Three queries; "a" succeeds with two layers, "b" with none, "c" never and was not even generated beyond no pruning.
ROLLOUTS = [
    Rollout("a", (), 1.0, ""),
    Rollout("a", (1,), 0.0, ""),
    Rollout("a", (1, 2), 1.0, ""),
    Rollout("b", (), 1.0, ""),
    Rollout("b", (1,), 0.5, ""),
    Rollout("b", (2,), 0.0, ""),
    Rollout("c", (), 0.0, ""),
]
LIKELIHOODS = [
    Likelihood("a", (), 0.25),
    Likelihood("a", (1, 2), 0.5),
    Likelihood("a", (0, 1, 2, 3), 4.0),
    Likelihood("b", (), 0.75),
    Likelihood("b", (1, 2), 1.0),
]


def test_statistics_are_those_of_a_table_made_by_hand():
    assert exploration_statistics(iter(ROLLOUTS), iter(LIKELIHOODS), 1.0) == ExplorationStatistics(
        queries=3,
        distinct_configurations=5,  # (), (1), (2), (1 2), (0 1 2 3)
        generated=7,
        estimated=5,
        success=1 / 4,
        pruned_layers=5 / 4,
        pruned_layers_deviation=pytest.approx(math.sqrt(3) / 4),
        score_variance=pytest.approx((2 / 9 + 1 / 6 + 0) / 3),
        deepest_success=1.0,  # 2 of "a", 0 of "b"
        by_size=(
            SizeStatistics(0, generated=3, estimated=2, success=2 / 3, nats_per_token=0.5, oracle=2 / 3),
            SizeStatistics(1, generated=3, estimated=0, success=0.0, nats_per_token=None, oracle=1 / 3),
            SizeStatistics(2, generated=1, estimated=2, success=1.0, nats_per_token=0.75, oracle=1 / 3),
            SizeStatistics(3, generated=0, estimated=0, success=None, nats_per_token=None, oracle=0.0),
            SizeStatistics(4, generated=0, estimated=1, success=None, nats_per_token=4.0, oracle=0.0),
        ),
    )


def test_what_counts_as_a_success_is_given():
    by_size = exploration_statistics(ROLLOUTS, [], 0.5).by_size
    assert [(size.success, size.oracle) for size in by_size] == [(2 / 3, 2 / 3), (1 / 3, 2 / 3), (1.0, 1 / 3)]


def test_of_nothing_there_are_no_statistics_but_zeros():
    assert exploration_statistics([], [], 1.0) == ExplorationStatistics(0, 0, 0, 0, None, None, None, None, None, ())


def test_statistics_are_json_and_a_small_table():
    statistics = exploration_statistics(ROLLOUTS, LIKELIHOODS, 1.0)
    assert json.loads(json.dumps(asdict(statistics), allow_nan=False))["by_size"][1]["nats_per_token"] is None
    lines = list(statistics_lines(statistics))
    assert lines[0] == "3 queries, 5 distinct configurations, 7 generated, 5 estimated"
    assert lines[1].startswith("with pruned layers 25% succeeded, 1.2 ± 0.4 layers; deepest success of a query 1.0 layers;")
    assert [line.split() for line in lines[3:5]] == [["0", "3", "67%", "2", "0.500", "67%"], ["1", "3", "0%", "0", "-", "33%"]]
    assert len({len(line) for line in lines[2:]}) == 1


@pytest.mark.parametrize(("score", "perfect"), [("json_match", 1.0), ("partial_match", 10.0)])
def test_a_perfect_answer_scores_what_it_should(score, perfect):
    from dynprune.data.tasks import Query
    from dynprune.metrics.scores import SCORES, perfect_score

    call = {"name": "f", "arguments": {"x": 1}}
    query = Query("q", "simple", ({"role": "user", "content": "x"},), (), (call,), ())
    assert perfect_score(score) == perfect == SCORES[score](json.dumps([call]), query)
