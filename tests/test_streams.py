import itertools
import pickle
import random
from collections import Counter
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader, get_worker_info

from dynprune.data import streams
from dynprune.data.filtering import keep_successful
from dynprune.data.pairs import read_pairs, write_pairs
from dynprune.data.rollouts import Rollout, RolloutWriter
from dynprune.data.streams import PairStream, RolloutStream

L = 9
keep_deep = partial(keep_successful, min_score=1.0, min_share_of_deepest=0.5)


def allows_all(mask_BL):
    return torch.ones(len(mask_BL), dtype=torch.bool)


def allows_two_layers(mask_BL):
    return mask_BL.sum(dim=1) <= 2


def rollouts_of(query_id, count):
    return [Rollout(query_id, tuple(range(k)), float(k != 3), "out") for k in range(count)]


def folder_of(tmp_path, *counts):
    writer = RolloutWriter(tmp_path / "rollouts", num_layers=L, score="json_match")
    for query, count in enumerate(counts):
        writer.append(rollouts_of(f"q{query}", count))
    return tmp_path / "rollouts"


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    """The pairs of 16 queries in many row groups, the last of them shorter; the rollouts are beside them."""
    folder = tmp_path_factory.mktemp("streams")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dynprune.data.pairs._ROWS_PER_GROUP", 10)
        rollouts = folder_of(folder, *[2 + i % 6 for i in range(16)])
        counts = write_pairs(rollouts, folder / "pairs.parquet", "all", None, 0)
    assert counts.pairs % 10
    return folder / "pairs.parquet"


def layers(mask_L):
    assert mask_L.dtype == torch.bool
    assert mask_L.shape == (L,)
    return tuple(mask_L.nonzero()[:, 0].tolist())


def pair_key(item):
    return (
        item["id"],
        layers(item["winner_mask_L"]),
        layers(item["loser_mask_L"]),
        item["winner_score"],
        item["loser_score"],
    )


def rollout_key(item):
    return item["id"], layers(item["mask_L"]), item["score"]


def keys_in(path):
    return [(p.id, p.winner_pruned_layers, p.loser_pruned_layers, p.winner_score, p.loser_score) for p in read_pairs(path)]


class Place:
    """Where an iteration is said to run: a rank of a distributed run, and a worker of its DataLoader."""

    def __init__(self, monkeypatch):
        self._patch = monkeypatch

    def rank(self, rank, ranks):
        self._patch.setattr(torch.distributed, "is_initialized", lambda: True)
        self._patch.setattr(torch.distributed, "get_rank", lambda: rank)
        self._patch.setattr(torch.distributed, "get_world_size", lambda: ranks)

    def no_process_group(self):
        self._patch.setattr(torch.distributed, "is_initialized", lambda: False)

    def worker(self, worker, workers):
        info = type("Info", (), {"id": worker, "num_workers": workers})()
        self._patch.setattr(streams, "get_worker_info", lambda: info)


@pytest.fixture
def place(monkeypatch):
    return Place(monkeypatch)


def deal(place, stream, ranks, workers):
    """What each worker of each rank gets: by_rank[rank][worker]."""
    by_rank = []
    for rank in range(ranks):
        place.rank(rank, ranks)
        by_rank.append([])
        for worker in range(workers):
            place.worker(worker, workers)
            by_rank[-1].append(list(stream))
    return by_rank


# Items


def test_a_pair_stream_yields_the_pairs_of_the_file_as_masks(pairs_file):
    items = list(PairStream(pairs_file, allows_all, seed=None))

    assert [pair_key(item) for item in items] == keys_in(pairs_file)
    assert set(items[0]) == {"id", "winner_mask_L", "loser_mask_L", "winner_score", "loser_score"}


def test_a_rollout_stream_yields_what_the_filter_keeps_as_masks(tmp_path):
    # Of sizes 0, 1, 2, 3 and 4 that with three layers fails; at least half of four is two.
    folder = folder_of(tmp_path, 5, 1, 4)
    items = list(RolloutStream(folder, allows_all, keep_deep, seed=None))

    assert [rollout_key(item) for item in items] == [
        ("q0", (0, 1), 1.0),
        ("q0", (0, 1, 2, 3), 1.0),
        ("q1", (), 1.0),
        ("q2", (0,), 1.0),
        ("q2", (0, 1), 1.0),
    ]
    assert set(items[0]) == {"id", "mask_L", "score", "desirable", "mean_score", "mean_pruned"}
    assert all(item["desirable"] for item in items)


def test_a_rollout_stream_can_yield_all_rollouts_each_with_the_filters_verdict_and_its_querys_means(tmp_path):
    stream = RolloutStream(folder_of(tmp_path, 8, 1), allows_two_layers, keep_deep, seed=None, only_kept=False)

    # The means are over what the policy allows: no, one and two layers, all of them successes.
    assert [(*rollout_key(i), i["desirable"], i["mean_score"], i["mean_pruned"]) for i in stream] == [
        ("q0", (), 1.0, False, 1.0, 1.0),
        ("q0", (0,), 1.0, True, 1.0, 1.0),
        ("q0", (0, 1), 1.0, True, 1.0, 1.0),
        ("q1", (), 1.0, True, 1.0, 0.0),
    ]


def test_the_means_of_a_query_count_its_failures(tmp_path):
    first = next(iter(RolloutStream(folder_of(tmp_path, 4), allows_all, keep_deep, seed=None)))

    assert (first["mean_score"], first["mean_pruned"]) == (0.75, 1.5)


@pytest.mark.parametrize(("only_kept", "items", "pruned"), [(True, 5, 9), (False, 10, 16)])
def test_a_rollout_stream_counts_its_items_and_their_pruned_layers(tmp_path, only_kept, items, pruned):
    stream = RolloutStream(folder_of(tmp_path, 5, 1, 4), allows_all, keep_deep, seed=0, only_kept=only_kept)

    assert (stream.num_items, stream.num_pruned) == (items, pruned)
    depths = [int(item["mask_L"].sum()) for item in stream]
    assert (sum(depths), max(depths)) == (pruned, stream.deepest)


def test_what_the_policy_cannot_express_is_left_out_before_the_filter_looks_for_the_deepest(tmp_path):
    items = list(RolloutStream(folder_of(tmp_path, 8), allows_two_layers, keep_deep, seed=None))

    assert [rollout_key(item) for item in items] == [("q0", (0,), 1.0), ("q0", (0, 1), 1.0)]


def test_a_pair_of_which_one_side_is_impossible_is_left_out(pairs_file):
    stream = PairStream(pairs_file, allows_two_layers, seed=None)
    possible = [key for key in keys_in(pairs_file) if len(key[1]) <= 2 and len(key[2]) <= 2]

    assert [pair_key(item) for item in stream] == possible
    assert len(stream) == len(possible) < len(keys_in(pairs_file))


def test_a_stream_knows_the_number_of_layers(pairs_file):
    assert PairStream(pairs_file, allows_all, seed=None).num_layers == L
    assert RolloutStream(pairs_file.parent / "rollouts", allows_all, keep_deep, seed=None).num_layers == L


# Ranks and workers


@pytest.fixture(params=["pairs", "rollouts"])
def stream_and_key(request, pairs_file):
    """Makes the stream with a seed, and what tells its items apart."""

    def make(seed):
        if request.param == "pairs":
            return PairStream(pairs_file, allows_all, seed, shuffle_buffer=13)
        return RolloutStream(pairs_file.parent / "rollouts", allows_all, keep_deep, seed, shuffle_buffer=5)

    return make, pair_key if request.param == "pairs" else rollout_key


SEEDS = [None, 0]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_the_workers_of_one_rank_see_each_item_exactly_once(stream_and_key, place, seed, workers):
    make, key = stream_and_key
    stream = make(seed)
    expected = Counter(key(item) for item in make(None))
    ((*by_worker,),) = deal(place, stream, 1, workers)

    assert Counter(key(item) for items in by_worker for item in items) == expected
    assert set(expected.values()) == {1}
    assert len(stream) == expected.total()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 8])
def test_every_rank_gets_equally_many_and_no_item_is_missed(stream_and_key, place, seed, workers, ranks):
    make, key = stream_and_key
    stream = make(seed)
    total = len(make(None))
    by_rank = deal(place, stream, ranks, workers)
    counts = [sum(map(len, by_worker)) for by_worker in by_rank]
    seen = Counter(key(item) for by_worker in by_rank for items in by_worker for item in items)

    assert set(counts) == {-(-total // ranks)} == {len(stream)}
    assert len(seen) == total
    # What is repeated fills up the last ranks, with one item each.
    assert seen.total() - total == -total % ranks
    assert max(seen.values()) <= 2
    # Equally many batches follow, whatever the size of a batch.
    assert len({tuple(map(len, by_worker)) for by_worker in by_rank}) == 1


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_ranks_batches_together_are_those_of_one_process(stream_and_key, place, seed, ranks):
    make, key = stream_and_key
    stream = make(seed)
    ((alone,),) = deal(place, stream, 1, 1)
    by_rank = [[key(item) for item in of_rank] for (of_rank,) in deal(place, stream, ranks, 1)]
    together = [item for of_all in zip(*by_rank, strict=True) for item in of_all]
    expected = [key(item) for item in alone]
    assert together == [*expected, *expected[: -len(expected) % ranks]]


def test_more_ranks_than_items_get_one_item_each(tmp_path, place):
    stream = RolloutStream(
        folder_of(tmp_path, 3), allows_all, partial(keep_successful, min_score=1.0, min_share_of_deepest=0.0), 0
    )
    by_rank = deal(place, stream, 8, 2)

    seen = Counter(rollout_key(item) for by_worker in by_rank for items in by_worker for item in items)
    assert [sum(map(len, by_worker)) for by_worker in by_rank] == [1] * 8
    assert sorted(seen.values()) == [2, 3, 3]


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_the_workers_of_a_real_loader_share_the_items(pairs_file, method):
    stream = PairStream(pairs_file, allows_all, seed=1, shuffle_buffer=20)
    loader = DataLoader(stream, batch_size=16, num_workers=2, multiprocessing_context=method, collate_fn=list)
    seen = Counter(pair_key(item) for batch in loader for item in batch)

    assert get_worker_info() is None
    assert seen == Counter(keys_in(pairs_file))


def test_the_default_collation_makes_batches_of_masks(pairs_file):
    batch = next(iter(DataLoader(PairStream(pairs_file, allows_all, seed=0), batch_size=16)))

    assert batch["winner_mask_L"].shape == batch["loser_mask_L"].shape == (16, L)
    assert len(batch["id"]) == 16


def test_a_worker_that_is_not_forked_takes_its_rank_along(pairs_file, place):
    stream = PairStream(pairs_file, allows_all, seed=0, shuffle_buffer=20)
    place.rank(1, 3)
    of_rank_1 = [pair_key(item) for item in stream]
    sent = pickle.dumps(stream)

    place.no_process_group()
    assert [pair_key(item) for item in pickle.loads(sent)] == of_rank_1
    assert len(list(stream)) > len(of_rank_1)


def test_a_stream_pickled_before_the_run_is_distributed_follows_the_process_group(pairs_file, place):
    stream = pickle.loads(pickle.dumps(PairStream(pairs_file, allows_all, seed=0)))
    place.rank(1, 3)
    of_rank_1 = list(stream)

    assert len(of_rank_1) == len(stream) == len(keys_in(pairs_file)) // 3


# Order


def order(stream, key, epoch):
    stream.set_epoch(epoch)
    return [key(item) for item in stream]


def test_the_order_follows_from_the_seed_and_the_epoch(stream_and_key):
    make, key = stream_and_key
    stream = make(3)
    by_epoch = [order(stream, key, epoch) for epoch in range(3)]

    assert len(set(map(tuple, by_epoch))) == 3
    assert all(sorted(one) == sorted(by_epoch[0]) for one in by_epoch)
    assert order(make(3), key, 1) == by_epoch[1]
    assert order(make(4), key, 1) != by_epoch[1]
    assert order(stream, key, 0) == by_epoch[0]


def test_a_stream_without_a_seed_keeps_the_order_of_the_file_in_every_epoch(stream_and_key):
    make, key = stream_and_key

    assert order(make(None), key, 0) == order(make(None), key, 5)


def test_a_shuffled_epoch_mixes_the_queries(pairs_file):
    in_file = [key[0] for key in keys_in(pairs_file)]
    shuffled = [item["id"] for item in PairStream(pairs_file, allows_all, seed=0)]

    def neighbours(ids):
        return sum(a == b for a, b in itertools.pairwise(ids))

    # In the file each query's pairs are side by side.
    assert neighbours(in_file) == len(in_file) - len(set(in_file))
    assert neighbours(shuffled) < len(in_file) / 4


def test_a_buffer_of_one_item_still_draws_the_order_of_the_pieces_anew_in_each_epoch(pairs_file):
    stream = PairStream(pairs_file, allows_all, seed=0, shuffle_buffer=1)
    shuffled = order(stream, pair_key, 0)
    assert order(stream, pair_key, 1) != shuffled
    in_file = keys_in(pairs_file)

    assert shuffled != in_file
    # Items of a row group stay next to each other.
    steps = [in_file.index(b) - in_file.index(a) for a, b in itertools.pairwise(shuffled)]
    assert sum(step != 1 for step in steps) <= len(in_file) / 10


def test_the_buffer_holds_no_more_items_than_it_may():
    read = []

    def items():
        for i in range(100):
            read.append(i)
            yield {"id": i}

    stream = streams._shuffled(items(), 10, random.Random(0))
    for given in range(1, 80):
        next(stream)
        assert len(read) - given <= 10


# Mistakes


def test_an_empty_stream_says_what_to_change(pairs_file):
    def allows_none(mask_BL):
        return torch.zeros(len(mask_BL), dtype=torch.bool)

    with pytest.raises(ValueError, match=r"pairs\.parquet has two configurations .*router\.k_max"):
        PairStream(pairs_file, allows_none, seed=0)
    keep_none = partial(keep_successful, min_score=2.0, min_share_of_deepest=0.5)
    for only_kept in (True, False):
        with pytest.raises(ValueError, match=r"no rollout in .*the method's min_score.*exploration\.max_queries"):
            RolloutStream(pairs_file.parent / "rollouts", allows_all, keep_none, seed=0, only_kept=only_kept)


def test_a_buffer_without_room_is_refused(pairs_file):
    with pytest.raises(ValueError, match=r"shuffle_buffer=0 .*at least 1"):
        PairStream(pairs_file, allows_all, seed=0, shuffle_buffer=0)


def test_a_stream_over_a_missing_file_names_it(tmp_path):
    with pytest.raises(ValueError, match=r"none\.parquet does not exist"):
        PairStream(tmp_path / "none.parquet", allows_all, seed=0)
    with pytest.raises(ValueError, match="holds no rollouts"):
        RolloutStream(tmp_path, allows_all, keep_deep, seed=0)
