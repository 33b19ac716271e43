"""The stage ``explore`` on a tiny random model: what it leaves on the disk, and going on after a stop."""

import json

import pytest
from tiny import composed

from dynprune.data.pairs import read_pairs
from dynprune.data.rollouts import RolloutWriter, read_likelihoods, read_rollouts
from dynprune.stages.explore import STATISTICS, explore
from dynprune.stages.pairs import PAIRS, pairs
from dynprune.stages.run import Run


def tiny(folder, *overrides: str) -> Run:
    paths = [f"paths.run={folder}/run", f"paths.artifacts={folder}/artifacts"]
    return Run(composed("experiment=tiny", "adapter=identity", "exploration.max_queries=4", *paths, *overrides))


GUIDED = (
    "exploration=beam",
    "exploration.strategy.depth=3",
    "exploration.strategy.confirmed=1",
    "exploration.max_estimates=13",
)


def everything(folder):
    return list(read_rollouts(folder)), list(read_likelihoods(folder))


def test_a_guided_search_that_was_stopped_goes_on_and_leaves_what_one_that_was_not_leaves(tmp_path, monkeypatch, caplog):
    whole = explore(tiny(tmp_path / "whole", *GUIDED)).folder

    append, appended = RolloutWriter.append, []

    def stop_after_two(self, rollouts, place=None):
        if len(appended) == 2:
            raise KeyboardInterrupt
        appended.append(rollouts)
        append(self, rollouts, place)

    with monkeypatch.context() as patch:
        patch.setattr(RolloutWriter, "append", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            explore(tiny(tmp_path / "stopped", *GUIDED))
    [journal] = (tmp_path / "stopped/artifacts/explore").glob("*.partial/in-flight.jsonl")
    in_flight = list(map(json.loads, journal.read_text().splitlines()))
    with caplog.at_level("INFO"):
        artifact = explore(tiny(tmp_path / "stopped", *GUIDED))
    assert artifact.manifest["counts"]["resumed_queries"] == 2
    done = {query_id for rollouts in appended for query_id in (rollout.id for rollout in rollouts)}
    resumed = [record for record in in_flight if record["id"] not in done]
    assert artifact.manifest["counts"]["resumed_in_flight"] == len(resumed) > 0
    assert not (artifact.folder / "in-flight.jsonl").exists()

    rollouts, likelihoods = everything(whole)
    assert everything(artifact.folder) == (rollouts, likelihoods)
    # Of four layers: no pruning, four sets of one layer, six of two and, with what is left, two of three; the best generated.
    assert len(likelihoods) == 4 * 13
    assert len(rollouts) == 4 * (1 + 3)
    assert "explored 4 queries" in caplog.text
    statistics = json.loads((artifact.folder / STATISTICS).read_text())
    assert statistics == json.loads((whole / STATISTICS).read_text())
    assert (statistics["queries"], statistics["generated"], statistics["estimated"]) == (4, 16, 52)
    assert [size["generated"] for size in statistics["by_size"]] == [4, 4, 4, 4]


def test_dense_rewards_beside_scores_are_another_artifact_and_can_decide_the_pairs(tmp_path):
    plain = tiny(tmp_path, "exploration.max_configurations=3")
    estimated = tiny(
        tmp_path, "exploration.max_configurations=3", "exploration.estimate_all=true", "pairs.prefer_by=likelihood"
    )
    scores, none = everything(explore(plain).folder)
    both, likelihoods = everything(explore(estimated).folder)
    assert explore(plain).fingerprint != explore(estimated).fingerprint
    assert none == []
    assert [(r.id, r.pruned_layers, r.score) for r in both] == [(r.id, r.pruned_layers, r.score) for r in scores]
    assert [one.nats_per_token for one in likelihoods] == [r.nats_per_token for r in both]
    nats = {(one.id, one.pruned_layers): one.nats_per_token for one in likelihoods}
    found = list(read_pairs(pairs(estimated).folder / PAIRS))
    # Three configurations of each query, of three different likelihoods.
    assert len(found) == 4 * 3
    for pair in found:
        assert nats[pair.id, pair.winner_pruned_layers] < nats[pair.id, pair.loser_pruned_layers]
