import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dynprune.data.filtering import keep_successful
from dynprune.data.rollouts import (
    Likelihood,
    Rollout,
    RolloutWriter,
    by_query,
    completed_ids,
    read_header,
    read_likelihoods,
    read_rollouts,
    read_shard,
    shards,
)

L = 6


def rollouts_of(query_id, count=3):
    return [Rollout(query_id, tuple(range(k)), 1.0 - k / 8, f'[{{"é": {k}}}]\n') for k in range(count)]


@pytest.fixture
def writer(tmp_path):
    return RolloutWriter(tmp_path, num_layers=L, score="json_match")


def reopen(folder, **changes):
    return RolloutWriter(folder, **{"num_layers": L, "score": "json_match"} | changes)


def shards_in(folder):
    return len(list(folder.glob("*.parquet")))


# Writing and reading


def test_what_is_appended_is_read_back_in_order(tmp_path, writer):
    queries = [rollouts_of("b"), rollouts_of("a", 1), rollouts_of("c") + rollouts_of("ü", 6)]
    for rollouts in queries:
        writer.append(rollouts)

    assert list(read_rollouts(tmp_path)) == [rollout for rollouts in queries for rollout in rollouts]
    assert [r.id for r in read_shard(shards(tmp_path)[2])] == ["c"] * 3 + ["ü"] * 6
    assert [[r.id for r in group] for group in by_query(read_rollouts(tmp_path))] == [
        ["b"] * 3,
        ["a"],
        ["c"] * 3,
        ["ü"] * 6,
    ]


def test_a_shard_has_the_columns_of_the_thesis_and_says_what_it_is_about(tmp_path, writer):
    writer.append(rollouts_of("a"))

    table = pq.read_table(shards(tmp_path)[0])
    assert table.column_names == ["id", "pruned_layers", "score", "output", "cut", "nats_per_token"]
    assert table.schema.metadata == {
        b"dynprune.schema_version": b"2",
        b"dynprune.num_layers": b"6",
        b"dynprune.score": b"json_match",
    }
    header = read_header(tmp_path)
    assert (header.num_layers, header.score) == (6, "json_match")


def test_a_shard_larger_than_what_is_read_at_once_is_read_whole(tmp_path, writer):
    rollouts = [rollout for i in range(1500) for rollout in rollouts_of(f"q{i}", 2)]
    writer.append(rollouts)

    assert list(read_rollouts(tmp_path)) == rollouts


def test_rollouts_and_mere_likelihoods_of_a_query_are_read_apart(tmp_path, writer):
    rollouts = [Rollout("a", (), 1.0, "x", False, 0.25), Rollout("a", (1,), 0.0, "", True), Rollout("b", (2,), 0.5, "y")]
    writer.append([rollouts[0], Likelihood("a", (3, 4), 1.5), rollouts[1], Likelihood("a", (5,), 0.0)])
    writer.append(rollouts[2:])
    writer.append([Likelihood("c", (), 2.0)])

    assert list(read_rollouts(tmp_path)) == rollouts
    assert list(read_likelihoods(tmp_path)) == [
        Likelihood("a", (), 0.25),
        Likelihood("a", (3, 4), 1.5),
        Likelihood("a", (5,), 0.0),
        Likelihood("c", (), 2.0),
    ]
    assert completed_ids(tmp_path) == {"a", "b", "c"}
    assert pq.read_table(shards(tmp_path)[0])["score"].to_pylist() == [1.0, None, 0.0, None]


def test_appending_nothing_writes_nothing(tmp_path, writer):
    writer.append([])

    assert list(tmp_path.iterdir()) == []


# Going on


def test_a_reopened_folder_knows_its_queries_and_goes_on_with_new_shards(tmp_path, writer):
    writer.append(rollouts_of("a"))
    writer.append(rollouts_of("b") + rollouts_of("c"))
    assert writer.completed_ids == {"a", "b", "c"} == completed_ids(tmp_path)

    again = reopen(tmp_path)
    assert again.completed_ids == {"a", "b", "c"}
    again.append(rollouts_of("d"))
    assert [r.id for r in read_rollouts(tmp_path)] == [i for i in "abcd" for _ in range(3)]


def test_a_folder_that_is_missing_has_no_completed_queries(tmp_path):
    assert completed_ids(tmp_path / "none") == set()


def test_what_a_killed_writer_left_is_removed_and_never_read(tmp_path, writer):
    writer.append(rollouts_of("a"))
    leftover = tmp_path / ".rollouts-000001.parquet.k3x_9"
    leftover.mkdir()
    (leftover / "rollouts-000001.parquet").write_bytes(b"PAR1 half of a shard")

    assert list(read_rollouts(tmp_path)) == rollouts_of("a")
    assert reopen(tmp_path).completed_ids == {"a"}
    assert not leftover.exists()
    assert len(shards(tmp_path)) == 1


def test_a_shard_that_fails_on_the_way_to_the_disk_leaves_nothing_and_can_be_appended_again(tmp_path, writer, monkeypatch):
    writer.append(rollouts_of("a"))

    def fail(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="no space left"):
            writer.append(rollouts_of("b"))
    assert writer.completed_ids == {"a"} == completed_ids(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1

    writer.append(rollouts_of("b"))
    assert list(read_rollouts(tmp_path)) == rollouts_of("a") + rollouts_of("b")


def test_a_process_killed_while_it_writes_loses_no_query_it_was_done_with(tmp_path):
    program = f"""
from pathlib import Path
from dynprune.data.rollouts import Rollout, RolloutWriter
writer = RolloutWriter(Path({str(tmp_path)!r}), num_layers=40, score="json_match")
for i in range(100_000):
    writer.append([Rollout(f"q{{i}}", tuple(range(k)), 0.5, "x" * 1000) for k in range(40)])
    print(f"q{{i}}", flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    )
    said = [process.stdout.readline().strip() for _ in range(7)]
    process.send_signal(signal.SIGKILL)
    said += process.stdout.read().split()
    process.wait()

    writer = reopen(tmp_path, num_layers=40)
    assert writer.completed_ids >= set(said) - {""}
    assert "q6" in writer.completed_ids
    groups = list(by_query(read_rollouts(tmp_path)))
    assert [len(group) for group in groups] == [40] * len(writer.completed_ids)


# What a writer refuses


def test_a_query_is_never_appended_twice(tmp_path, writer):
    writer.append(rollouts_of("a"))

    for each in (writer, reopen(tmp_path)):
        with pytest.raises(ValueError, match=r"query 'a' has rollouts in .* already"):
            each.append(rollouts_of("b") + rollouts_of("a"))
    assert list(read_rollouts(tmp_path)) == rollouts_of("a")
    assert writer.completed_ids == {"a"}


def test_the_rollouts_of_a_query_stay_together(tmp_path, writer):
    with pytest.raises(ValueError, match="query 'a' must be appended one after another"):
        writer.append([*rollouts_of("a"), *rollouts_of("b"), *rollouts_of("a", 1)])
    assert shards_in(tmp_path) == 0


@pytest.mark.parametrize("layers", [(2, 1), (1, 1), (-1,), (0, 6)])
def test_a_malformed_configuration_is_refused(tmp_path, writer, layers):
    with pytest.raises(ValueError, match=r"query 'a' has pruned_layers=.*0 to 5 in ascending order"):
        writer.append([Rollout("a", layers, 1.0, "")])
    assert shards_in(tmp_path) == 0


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_that_cannot_be_compared_is_refused(tmp_path, writer, score):
    with pytest.raises(ValueError, match="query 'a' has score="):
        writer.append([Rollout("a", (), score, "")])
    assert shards_in(tmp_path) == 0


@pytest.mark.parametrize("nats", [float("nan"), float("inf")])
@pytest.mark.parametrize("of", [lambda nats: Rollout("a", (), 1.0, "", False, nats), lambda nats: Likelihood("a", (), nats)])
def test_a_dense_reward_that_cannot_be_compared_is_refused(tmp_path, writer, of, nats):
    with pytest.raises(ValueError, match="query 'a' has nats_per_token="):
        writer.append([of(nats)])
    assert shards_in(tmp_path) == 0


def test_a_second_writer_does_not_overwrite_the_first(tmp_path, writer):
    second = reopen(tmp_path)
    writer.append(rollouts_of("a"))

    with pytest.raises(ValueError, match="another process writes into"):
        second.append(rollouts_of("b"))
    assert list(read_rollouts(tmp_path)) == rollouts_of("a")


@pytest.mark.parametrize(
    ("changes", "values"), [({"num_layers": 8}, "num_layers=6, where 8"), ({"score": "f1"}, "'json_match', where 'f1'")]
)
def test_a_folder_about_another_slm_or_score_is_refused_with_both_values(tmp_path, writer, changes, values):
    writer.append(rollouts_of("a"))

    with pytest.raises(ValueError, match=rf"rollouts-000000\.parquet has .*{values}"):
        reopen(tmp_path, **changes)


# What readers refuse


def test_shards_that_disagree_are_refused(tmp_path, writer):
    writer.append(rollouts_of("a"))
    reopen(tmp_path / "other", num_layers=7).append(rollouts_of("b"))
    shards(tmp_path / "other")[0].rename(tmp_path / "rollouts-000001.parquet")

    with pytest.raises(ValueError, match=r"rollouts-000001\.parquet has num_layers=7, where 6"):
        read_header(tmp_path)


def test_a_query_in_two_shards_is_refused(tmp_path, writer):
    writer.append(rollouts_of("a"))
    (tmp_path / "rollouts-000007.parquet").write_bytes(shards(tmp_path)[0].read_bytes())

    with pytest.raises(ValueError, match=r"rollouts-000007\.parquet holds query 'a'"):
        reopen(tmp_path)


def test_a_folder_without_rollouts_is_named(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path} holds no rollouts.*stage=explore"):
        list(read_rollouts(tmp_path))
    with pytest.raises(ValueError, match="holds no rollouts"):
        read_header(tmp_path)


@pytest.mark.parametrize("damage", ["empty", "truncated", "text"])
def test_a_broken_shard_is_named(tmp_path, writer, damage):
    writer.append(rollouts_of("a"))
    path = shards(tmp_path)[0]
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "truncated": whole[: len(whole) // 2], "text": b"no parquet at all"}[damage])

    for read in (reopen, completed_ids, read_header, lambda folder: list(read_rollouts(folder))):
        with pytest.raises(ValueError, match=r"rollouts-000000\.parquet cannot be read"):
            read(tmp_path)


def test_a_flipped_bit_in_a_shard_is_noticed(tmp_path, writer):
    text = "the answer"
    writer.append([Rollout("a", (1,), 1.0, text)])
    path = shards(tmp_path)[0]
    data = path.read_bytes()
    assert text.encode() in data
    path.write_bytes(data.replace(text.encode(), b"the Answer"))

    with pytest.raises(ValueError, match=r"rollouts-000000\.parquet cannot be read .*CRC"):
        list(read_rollouts(tmp_path))


def test_a_shard_of_others_is_refused(tmp_path):
    path = tmp_path / "rollouts-000000.parquet"
    pq.write_table(pa.table({"id": ["a"]}), path)

    with pytest.raises(ValueError, match=r"rollouts-000000\.parquet was not written by dynprune"):
        reopen(tmp_path)


@pytest.mark.parametrize(("version", "reason"), [("1", "schema version 1"), ("2", r"columns \['id'\]")])
def test_a_shard_of_another_version_or_of_other_columns_is_refused(tmp_path, version, reason):
    path = tmp_path / "rollouts-000000.parquet"
    metadata = {
        "dynprune.schema_version": version,
        "dynprune.num_layers": "6",
        "dynprune.score": "json_match",
    }
    pq.write_table(pa.table({"id": ["a"]}).replace_schema_metadata(metadata), path)

    with pytest.raises(ValueError, match=rf"rollouts-000000\.parquet has .*{reason}"):
        reopen(tmp_path)


# The filter of filtered behavioural cloning


def outcomes(*sizes_and_scores):
    return [Rollout("a", tuple(range(size)), score, "") for size, score in sizes_and_scores]


@pytest.mark.parametrize(("share", "sizes"), [(0.0, [0, 5, 4, 3]), (0.61, [5, 4]), (0.6, [5, 4, 3]), (0.8, [5, 4]), (1.0, [5])])
def test_the_filter_keeps_successes_that_prune_nearly_as_much_as_the_deepest_success(share, sizes):
    rollouts = outcomes((0, 1.0), (5, 1.0), (6, 0.5), (4, 1.0), (4, 0.0), (3, 2.0))

    kept = keep_successful(rollouts, min_score=1.0, min_share_of_deepest=share)
    assert [len(rollout.pruned_layers) for rollout in kept] == sizes
    assert all(rollout.score >= 1.0 for rollout in kept)


def test_the_filter_counts_a_failure_that_prunes_more_for_nothing():
    rollouts = outcomes((2, 1.0), (6, 0.9))

    assert keep_successful(rollouts, 1.0, 1.0) == rollouts[:1]
    assert keep_successful(rollouts, 0.9, 1.0) == rollouts[1:]


def test_the_filter_keeps_no_pruning_where_nothing_else_succeeds():
    rollouts = outcomes((0, 1.0), (1, 0.0))

    assert keep_successful(rollouts, 1.0, 0.8) == rollouts[:1]
    assert keep_successful(rollouts, 2.0, 0.8) == []


def test_a_share_is_exact_where_its_product_is_not():
    assert 0.28 * 25 > 7
    rollouts = outcomes((25, 1.0), (7, 1.0), (6, 1.0))

    assert keep_successful(rollouts, 1.0, 0.28) == rollouts[:2]


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_outside_of_zero_to_one_is_refused(share):
    with pytest.raises(ValueError, match=r"method\.min_share_of_deepest="):
        keep_successful([], 1.0, share)


def test_shards_are_read_in_the_order_of_their_places_not_of_their_writing(tmp_path, writer):
    for name, place in (("c", 2), ("a", 0), ("d", 7), ("b", 1)):
        writer.append(rollouts_of(name), place)
    writer.append(rollouts_of("e"))
    assert list(dict.fromkeys(rollout.id for rollout in read_rollouts(tmp_path))) == ["a", "b", "c", "d", "e"]
    with pytest.raises(ValueError, match="at the same time"):
        writer.append(rollouts_of("f"), 7)
