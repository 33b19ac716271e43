import itertools
import os
import random
import tracemalloc
from collections import Counter
from dataclasses import astuple

import pyarrow.parquet as pq
import pytest

from dynprune.data.pairs import (
    PreferencePair,
    all_pairs,
    prefers,
    random_pairs,
    read_pairs,
    write_pairs,
)
from dynprune.data.rollouts import Likelihood, Rollout, RolloutWriter

L = 12


def some_rollouts(query_id, count, seed=0):
    """Distinct configurations with few levels of score, so that all kinds of ties come up."""
    rng = random.Random(f"{seed}-{query_id}")
    configurations = {}
    while len(configurations) < count:
        configurations[tuple(sorted(rng.sample(range(L), rng.randrange(5))))] = rng.randrange(3) / 2
    return [Rollout(query_id, layers, score, "out") for layers, score in configurations.items()]


def brute_force(rollouts):
    """Every ordered couple that the rule of the design calls a pair."""
    return {
        (a.id, a.pruned_layers, b.pruned_layers, a.score, b.score)
        for a in rollouts
        for b in rollouts
        if a.score > b.score or (a.score == b.score and len(a.pruned_layers) > len(b.pruned_layers))
    }


def write_rollouts(folder, queries):
    writer = RolloutWriter(folder, num_layers=L, score="json_match")
    for rollouts in queries:
        writer.append(rollouts)
    return folder


# The preference


@pytest.mark.parametrize(
    ("a", "b", "better"),
    [
        (((), 1.0), ((1, 2), 0.5), True),
        (((1, 2), 1.0), ((), 1.0), True),
        (((1, 2), 1.0), ((3,), 1.0), True),
        (((1, 2), 1.0), ((3, 4), 1.0), False),
        (((1, 2, 3), 0.0), ((), 0.1), False),
        (((0,), -5.0), ((), -5.0), True),
    ],
)
def test_the_higher_score_wins_and_then_the_larger_number_of_layers(a, b, better):
    assert prefers(Rollout("q", *a, ""), Rollout("q", *b, "")) is better


def test_of_two_rollouts_at_most_one_is_better():
    rollouts = some_rollouts("q", 60)
    ties = 0
    for a, b in itertools.product(rollouts, repeat=2):
        assert not (prefers(a, b) and prefers(b, a))
        tied = a.score == b.score and len(a.pruned_layers) == len(b.pruned_layers)
        assert (prefers(a, b) or prefers(b, a)) is not tied
        ties += tied
    assert ties > len(rollouts)


@pytest.mark.parametrize(
    ("a", "b", "margin", "better"),
    [
        (((), 0.5), ((1, 2), 0.75), 0.125, True),
        (((), 0.5), ((1, 2), 0.75), 0.25, False),
        (((1, 2), 0.75), ((), 0.5), 0.25, True),
        (((1, 2), 0.75), ((), 0.5), 0.125, False),
        (((1,), 0.5), ((2,), 0.75), 0.25, False),
        (((1,), 0.5), ((2,), 0.75), 0.0, True),
    ],
)
def test_by_likelihood_fewer_nats_win_beyond_the_margin_and_more_layers_within(a, b, margin, better):
    assert prefers(Likelihood("q", *a), Likelihood("q", *b), margin) is better


# Choosing pairs


@pytest.mark.parametrize("count", [0, 1, 2, 20])
def test_all_pairs_are_those_of_the_rule_and_each_once(count):
    rollouts = some_rollouts("q", count)
    pairs = [astuple(pair) for pair in all_pairs(rollouts)]

    assert set(pairs) == brute_force(rollouts)
    assert len(pairs) == len(set(pairs))


def test_the_order_of_the_rollouts_changes_no_winner():
    rollouts = some_rollouts("q", 20)

    assert set(all_pairs(rollouts)) == set(all_pairs(rollouts[::-1]))


@pytest.mark.parametrize("count", [1, 7, 60])
def test_random_pairs_are_distinct_pairs_of_the_rule(count):
    rollouts = some_rollouts("q", 20)
    pairs = [astuple(pair) for pair in random_pairs(rollouts, count, random.Random(0))]

    assert len(pairs) == count == len(set(pairs))
    assert set(pairs) <= brute_force(rollouts)


def test_random_pairs_are_all_pairs_where_these_are_fewer():
    rollouts = some_rollouts("q", 4)

    assert set(random_pairs(rollouts, 1000, random.Random(0))) == set(all_pairs(rollouts))
    assert random_pairs(rollouts[:1], 5, random.Random(0)) == []


def test_random_pairs_come_up_equally_often():
    rollouts = [Rollout("q", tuple(range(k)), 1.0, "") for k in range(4)]
    rng = random.Random(0)
    drawn = Counter(pair for _ in range(3000) for pair in random_pairs(rollouts, 2, rng))

    assert len(drawn) == 6
    # Each is drawn in 2 of 6 rounds; five standard deviations of that binomial count are 129.
    assert all(abs(count - 1000) < 129 for count in drawn.values())


# The file


def test_the_file_holds_every_pair_of_every_query_under_the_columns_of_the_thesis(tmp_path):
    queries = [some_rollouts(f"q{i}", 1 + i % 20) for i in range(60)]
    folder = write_rollouts(tmp_path / "rollouts", queries)
    counts = write_pairs(folder, tmp_path / "pairs.parquet", "all", None, seed=0)

    expected = [brute_force(rollouts) for rollouts in queries]
    read = [astuple(pair) for pair in read_pairs(tmp_path / "pairs.parquet")]
    assert set(read) == set().union(*expected)
    assert len(read) == sum(map(len, expected)) > 3000
    assert [i for i, _ in itertools.groupby(pair[0] for pair in read)] == [f"q{i}" for i in range(60) if expected[i]]
    assert astuple(counts) == (60, sum(map(bool, expected)), sum(map(len, queries)), len(read))
    assert counts.queries_with_pairs < 60

    file = pq.ParquetFile(tmp_path / "pairs.parquet")
    assert file.schema_arrow.names == [
        "id",
        "winner_pruned_layers",
        "loser_pruned_layers",
        "winner_score",
        "loser_score",
    ]
    assert file.schema_arrow.metadata[b"dynprune.num_layers"] == b"12"
    assert file.schema_arrow.metadata[b"dynprune.score"] == b"json_match"
    assert file.num_row_groups > 2


def test_pairs_whose_winner_scores_too_little_are_left_out(tmp_path):
    queries = [some_rollouts(f"q{i}", 20) for i in range(20)]
    folder = write_rollouts(tmp_path / "rollouts", queries)
    everything = {pair for rollouts in queries for pair in brute_force(rollouts)}
    wanted = {pair for pair in everything if pair[3] >= 0.5}
    assert 0 < len(wanted) < len(everything)
    write_pairs(folder, tmp_path / "all.parquet", "all", None, 0, min_winner_score=0.5)
    assert {astuple(pair) for pair in read_pairs(tmp_path / "all.parquet")} == wanted
    write_pairs(folder, tmp_path / "random.parquet", "random", 5, 0, min_winner_score=0.5)
    assert {astuple(pair) for pair in read_pairs(tmp_path / "random.parquet")} <= wanted
    with pytest.raises(ValueError, match=r"pairs\.min_winner_score=99"):
        write_pairs(folder, tmp_path / "none.parquet", "all", None, 0, min_winner_score=99)


@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_by_likelihood_every_configuration_that_was_estimated_is_compared(tmp_path, margin):
    queries = []
    for i in range(20):
        rng = random.Random(i)
        group = []
        for rollout in some_rollouts(f"q{i}", 12, seed=i):
            nats = rng.randrange(8) / 4
            kinds = [
                rollout,
                Rollout(rollout.id, rollout.pruned_layers, rollout.score, "", False, nats),
                Likelihood(rollout.id, rollout.pruned_layers, nats),
            ]
            group.append(rng.choice(kinds))
        queries.append(group)
    folder = write_rollouts(tmp_path / "rollouts", queries)
    counts = write_pairs(folder, tmp_path / "pairs.parquet", "all", None, 0, -1.0, "likelihood", margin)

    wanted = {
        (a.id, a.pruned_layers, b.pruned_layers, -a.nats_per_token, -b.nats_per_token)
        for group in queries
        for a, b in itertools.permutations([one for one in group if one.nats_per_token is not None], 2)
        if a.nats_per_token <= 1.0
        and (
            b.nats_per_token - a.nats_per_token > margin
            or (abs(a.nats_per_token - b.nats_per_token) <= margin and len(a.pruned_layers) > len(b.pruned_layers))
        )
    }
    read = [astuple(pair) for pair in read_pairs(tmp_path / "pairs.parquet")]
    assert set(read) == wanted
    assert len(read) == len(wanted) == counts.pairs > 300
    metadata = pq.ParquetFile(tmp_path / "pairs.parquet").schema_arrow.metadata
    assert metadata[b"dynprune.score"] == b"log_likelihood"


def test_of_equal_sizes_only_pairs_that_prune_as_many_layers_are_left(tmp_path):
    queries = [some_rollouts(f"q{i}", 15, seed=i) for i in range(6)]
    folder = write_rollouts(tmp_path / "rollouts", queries)
    write_pairs(folder, tmp_path / "pairs.parquet", "all", None, 0, equal_sizes=True)
    wanted = {pair for group in queries for pair in brute_force(group) if len(pair[1]) == len(pair[2])}
    read = [astuple(pair) for pair in read_pairs(tmp_path / "pairs.parquet")]
    assert set(read) == wanted
    assert len(read) == len(wanted) > 50

    alone = write_rollouts(tmp_path / "alone", [[Rollout("q", (), 1.0, ""), Rollout("q", (1,), 1.0, "")]])
    with pytest.raises(ValueError, match=r"of equal size do not differ in score \(pairs\.equal_sizes=true\)"):
        write_pairs(alone, tmp_path / "none.parquet", "all", None, 0, equal_sizes=True)


def test_by_score_what_was_only_estimated_is_left_out(tmp_path):
    queries = [some_rollouts(f"q{i}", 9) for i in range(4)]
    plain = write_rollouts(tmp_path / "plain", queries)
    mixed = write_rollouts(tmp_path / "mixed", [[Likelihood(group[0].id, (9, 10), 0.1), *group] for group in queries])
    counts = [write_pairs(folder, tmp_path / f"{folder.name}.parquet", "all", None, 0) for folder in (plain, mixed)]
    assert counts[0] == counts[1]
    assert list(read_pairs(tmp_path / "plain.parquet")) == list(read_pairs(tmp_path / "mixed.parquet"))


def test_rollouts_without_likelihoods_cannot_be_compared_by_them(tmp_path):
    folder = write_rollouts(tmp_path / "rollouts", [some_rollouts("q", 9)])
    with pytest.raises(ValueError, match=r"has a likelihood; type exploration\.estimate_all=true, or pairs\.prefer_by=score"):
        write_pairs(folder, tmp_path / "pairs.parquet", "all", None, 0, prefer_by="likelihood")
    with pytest.raises(ValueError, match=r"type pairs\.min_winner_score=null"):
        write_pairs(folder, tmp_path / "pairs.parquet", "all", None, 0, 1.0, prefer_by="likelihood")
    with pytest.raises(ValueError, match=r"pairs\.prefer_by='nats' is unknown; allowed: score, likelihood"):
        write_pairs(folder, tmp_path / "pairs.parquet", "all", None, 0, prefer_by="nats")
    for margin in (-0.1, float("nan")):
        with pytest.raises(ValueError, match=r"pairs\.margin=.* is negative"):
            write_pairs(folder, tmp_path / "pairs.parquet", "all", None, 0, margin=margin)
    assert not (tmp_path / "pairs.parquet").exists()


def test_a_pair_has_the_types_of_a_pair(tmp_path):
    folder = write_rollouts(tmp_path / "rollouts", [[Rollout("q", (), 1.0, ""), Rollout("q", (3, 7), 1.0, "")]])
    write_pairs(folder, tmp_path / "pairs.parquet", "all", None, seed=0)

    assert list(read_pairs(tmp_path / "pairs.parquet", batch_size=1)) == [PreferencePair("q", (3, 7), (), 1.0, 1.0)]


def test_random_pairs_of_a_query_depend_on_the_seed_and_on_no_other_query(tmp_path):
    queries = [some_rollouts(f"q{i}", 20) for i in range(5)]

    def pairs_of_q3(name, which, seed):
        folder = write_rollouts(tmp_path / name, which)
        counts = write_pairs(folder, tmp_path / f"{name}.parquet", "random", 6, seed)
        assert counts.pairs == 6 * len(which)
        return [pair for pair in read_pairs(tmp_path / f"{name}.parquet") if pair.id == "q3"]

    among_all = pairs_of_q3("all", queries, 0)
    assert len(set(among_all)) == 6
    assert {astuple(pair) for pair in among_all} <= brute_force(queries[3])
    assert pairs_of_q3("some", queries[3:], 0) == among_all
    assert pairs_of_q3("other", queries[3:], 1) != among_all


def test_random_pairs_of_queries_with_the_same_rollouts_differ(tmp_path):
    queries = [[Rollout(f"q{i}", tuple(range(k)), 1.0, "") for k in range(12)] for i in range(5)]
    write_pairs(write_rollouts(tmp_path / "rollouts", queries), tmp_path / "pairs.parquet", "random", 4, 0)

    drawn = itertools.groupby(read_pairs(tmp_path / "pairs.parquet"), key=lambda pair: pair.id)
    assert len({frozenset(astuple(pair)[1:] for pair in pairs) for _, pairs in drawn}) > 1


@pytest.mark.slow
def test_the_pairs_are_never_all_in_memory(tmp_path):
    def peak(count):
        rollouts = [rollout for i in range(count) for rollout in some_rollouts(f"q{i}", 16)]
        folder = write_rollouts(tmp_path / f"{count}", [rollouts])
        tracemalloc.start()
        write_pairs(folder, tmp_path / "pairs.parquet", "all", None, seed=0)
        for _ in read_pairs(tmp_path / "pairs.parquet"):
            pass
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    peak(20)
    assert peak(600) < 1.5 * peak(60)


def test_a_file_that_fails_on_the_way_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "pairs.parquet"
    folder = write_rollouts(tmp_path / "rollouts", [some_rollouts("q", 9)])
    write_pairs(folder, path, "all", None, seed=0)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        write_pairs(folder, path, "random", 1, seed=0)
    assert path.read_bytes() == before
    assert {entry.name for entry in tmp_path.iterdir()} == {"rollouts", "pairs.parquet"}


# Mistakes


@pytest.mark.parametrize(
    ("strategy", "count", "reason"),
    [
        ("best", None, r"pairs\.strategy='best' is unknown; allowed: all, random"),
        ("random", None, r"pairs\.count=None does not go with pairs\.strategy=random"),
        ("random", 0, r"pairs\.count=0 .*at least 1"),
        ("all", 5, r"pairs\.count=5 does not go with pairs\.strategy=all"),
    ],
)
def test_a_strategy_that_does_not_exist_or_go_with_the_count_is_refused(tmp_path, strategy, count, reason):
    folder = write_rollouts(tmp_path / "rollouts", [some_rollouts("q", 9)])

    with pytest.raises(ValueError, match=reason):
        write_pairs(folder, tmp_path / "pairs.parquet", strategy, count, seed=0)
    assert not (tmp_path / "pairs.parquet").exists()


def test_rollouts_that_give_no_pair_give_no_file(tmp_path):
    folder = write_rollouts(tmp_path / "rollouts", [some_rollouts(f"q{i}", 1) for i in range(3)])

    with pytest.raises(ValueError, match=r"none of the 3 queries in .* gives a preference pair"):
        write_pairs(folder, tmp_path / "pairs.parquet", "all", None, seed=0)
    assert not (tmp_path / "pairs.parquet").exists()


def test_a_file_of_pairs_that_is_missing_broken_or_something_else_is_named(tmp_path):
    folder = write_rollouts(tmp_path / "rollouts", [some_rollouts("q", 9)])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")

    for path, reason in [
        (tmp_path / "none.parquet", "does not exist"),
        (tmp_path / "broken.parquet", "cannot be read"),
        (folder / "rollouts-000000.parquet", "has the columns"),
    ]:
        with pytest.raises(ValueError, match=rf"{path.name} {reason}"):
            list(read_pairs(path))
