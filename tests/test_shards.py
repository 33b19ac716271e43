"""Exploration shared out to jobs: the merged rollouts are those of one job, byte for byte."""

import shutil

import pytest
from tiny import manifests, run_tiny

SETTINGS = (
    "stage=explore",
    "exploration.max_queries=7",
    "exploration.max_validation_queries=4",
    "exploration.estimate_all=true",
)


def rollouts_of(folder):
    explored = (folder / "outputs/artifacts/explore").glob("*/rollouts-*.parquet")
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in explored}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A folder in which three jobs made a shard each."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in (2, 0, 1):
        run_tiny(folder, f"job-{shard}", *SETTINGS, "exploration.shards=3", f"exploration.shard={shard}")
    return folder


@pytest.mark.slow
def test_what_jobs_made_is_merged_into_what_one_job_makes(sharded, tmp_path):
    shutil.copytree(sharded, tmp_path / "merged")
    assert len(manifests(tmp_path / "merged", "explore_shard")) == 6
    run_tiny(tmp_path / "merged", "merge", *SETTINGS, "exploration.shards=3")
    (tmp_path / "alone").mkdir()
    run_tiny(tmp_path / "alone", "alone", *SETTINGS)
    assert len(rollouts_of(tmp_path / "alone")) == 11
    assert rollouts_of(tmp_path / "merged") == rollouts_of(tmp_path / "alone")
    statistics = [
        sorted(path.read_text() for path in (tmp_path / name / "outputs/artifacts/explore").glob("*/statistics.json"))
        for name in ("merged", "alone")
    ]
    assert statistics[0] == statistics[1]


def test_a_gap_is_named_with_the_command_that_fills_it(sharded, tmp_path):
    shutil.copytree(sharded, tmp_path / "gap")
    [gone] = {m["fingerprint"] for m in manifests(tmp_path / "gap", "explore_shard") if m["counts"]["queries"] == 3}
    shutil.rmtree(tmp_path / "gap/outputs/artifacts/explore_shard" / gone)
    said = r"of the train split the shards 0 are missing; type dynprune -m stage=explore .*exploration.shard=0, with"
    with pytest.raises(ValueError, match=said):
        run_tiny(tmp_path / "gap", "merge", *SETTINGS, "exploration.shards=3")
    run_tiny(tmp_path / "gap", "job", *SETTINGS, "exploration.shards=3", "exploration.shard=0")
    run_tiny(tmp_path / "gap", "merge", *SETTINGS, "exploration.shards=3")


def test_a_query_in_two_shards_is_refused(sharded, tmp_path):
    shutil.copytree(sharded, tmp_path / "doubled")
    root = tmp_path / "doubled/outputs/artifacts/explore_shard"
    sizes = {m["fingerprint"]: m["counts"]["queries"] for m in manifests(tmp_path / "doubled", "explore_shard")}
    first = next(name for name, size in sizes.items() if size == 3)
    other = next(path for name, size in sizes.items() if size == 2 for path in [root / name] if name != first)
    # What stands in one shard is put in the place of another one's.
    for place in range(2):
        shutil.copyfile(root / first / f"rollouts-{place:06d}.parquet", other / f"rollouts-{place:06d}.parquet")
    with pytest.raises(ValueError, match=r"as another shard beside it|have 2 others"):
        run_tiny(tmp_path / "doubled", "merge", *SETTINGS, "exploration.shards=3")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("exploration.shards=3", "exploration.shard=3"), r"shard=3 is no shard of exploration.shards=3; allowed: 0 to 2"),
        (("exploration.shards=9", "exploration.shard=8"), r"shard=8 has no train query; lower exploration.shards=9"),
        (
            ("exploration.shards=3", "exploration.shard=1", "stage=router"),
            r"stage=router needs all of them; allowed: stage=explore",
        ),
    ],
)
def test_shards_that_cannot_be_are_refused(sharded, settings, said):
    with pytest.raises(ValueError, match=said):
        run_tiny(sharded, "refused", *SETTINGS, *settings)
