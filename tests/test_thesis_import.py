"""The thesis's published files, as its scripts lay them out, which the test writes; and a run on what was imported."""

import pytest
import torch
from datasets import Dataset
from tiny import composed, manifests, run_tiny, table_of

from dynprune.adapters.checkpoint import load_adapters, save_thesis_adapters
from dynprune.adapters.stack import AdapterStack
from dynprune.data.rollouts import Rollout, RolloutWriter, read_header, read_rollouts
from dynprune.router.checkpoint import load_router
from dynprune.router.encoder import TextEncoder
from dynprune.router.router import Router
from dynprune.stages.run import Run

L, D = 4, 32


def trained_router():
    """A router whose encoder was trained with the heads, as the thesis's was."""
    torch.manual_seed(3)
    router = Router(TextEncoder("tiny:", revision=None, max_length=256, trainable=True), L, 24)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return router.eval()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with what the thesis published, and a folder to work in."""
    folder = tmp_path_factory.mktemp("thesis")
    source = folder / "published"
    torch.manual_seed(1)
    stack = AdapterStack(num_layers=L, hidden_size=D, bottleneck=5, activation="relu", sink=False)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.normal_(std=0.1)
    save_thesis_adapters(stack, source / "adapter/1951")
    state = {name.replace("encoder.model.", "bert."): value for name, value in trained_router().state_dict().items()}
    (source / "router").mkdir(parents=True)
    # A pooler, which the thesis's class has and does not use.
    torch.save(state | {"bert.pooler.dense.weight": torch.zeros(2, 2)}, source / "router/dpo.pt")
    torch.save({"optimizer": 1}, source / "router/other.pt")
    queries = Run(composed("experiment=tiny", f"paths.run={folder}/x", f"paths.artifacts={folder}/y"))
    rows = [
        {"id": query.id, "pruned_layers": layers, "score": float(score), "output": "said"}
        for split in ("train", "validation")
        for query in queries.queries(split, None, "x")
        for layers, score in (([], 1), ([1], 1), ([2, 1], 0), ([0, 1, 3], 1))
    ]
    Dataset.from_list(rows).save_to_disk(source / "data/dfs_samples")
    pairs = [{"id": "a", "winner_pruned_layers": [1], "loser_pruned_layers": [2], "winner_score": 1.0, "loser_score": 0.0}]
    Dataset.from_list(pairs).save_to_disk(source / "data/pairs")
    run_tiny(folder, "import", "stage=import", f"source={source}")
    return folder, folder / "outputs/import/imported", stack, rows


def test_adapters_are_the_same_with_the_sizes_of_the_files(published):
    _, imported, stack, _ = published
    loaded = load_adapters(imported / "adapters/adapter-1951")
    assert (loaded.num_layers, loaded.hidden_size, loaded.bottleneck) == (L, D, 5)
    assert all(torch.equal(value, stack.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_a_router_says_the_same_its_trained_encoder_included(published):
    _, imported, _, _ = published
    router, extra = load_router(imported / "routers/router-dpo")
    expected = trained_router()
    features = router.encoder.tokenize(["Add 1 and 2.", "What?"])
    with torch.no_grad():
        got, want = (one(one.encode(features)) for one in (router, expected))
    torch.testing.assert_close(got.layer_logits_BL, want.layer_logits_BL)
    torch.testing.assert_close(got.ratio.mu_B, want.ratio.mu_B)
    assert extra["policy"]["num_layers"] == L
    assert not (imported / "routers/router-other").exists()


def test_rollouts_are_the_same_and_pairs_are_none(published):
    _, imported, _, rows = published
    folder = imported / "rollouts/data-dfs_samples"
    found = {(one.id, one.pruned_layers, one.score) for one in read_rollouts(folder)}
    assert found == {(row["id"], tuple(sorted(row["pruned_layers"])), row["score"]) for row in rows}
    assert (read_header(folder).num_layers, read_header(folder).score) == (L, "json_match")
    assert [path.name for path in (imported / "rollouts").iterdir()] == ["data-dfs_samples"]


def test_importing_again_changes_nothing(published):
    folder, imported, _, _ = published
    before = {path: path.read_bytes() for path in imported.rglob("*") if path.is_file()}
    run_tiny(folder, "import", "stage=import", f"source={folder}/published")
    assert {path: path.read_bytes() for path in imported.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_run_uses_what_was_imported(published):
    folder, imported, _, rows = published
    used = (
        f"adapter.folder={imported}/adapters/adapter-1951",
        f"router.folder={imported}/routers/router-dpo",
        "evaluation.latency.queries=0",
    )
    run_tiny(folder, "ready", *used)
    assert "router-dpo" in table_of(folder, "ready")
    assert not manifests(folder, "explore")
    run_tiny(folder, "learned", f"exploration.folder={imported}/rollouts/data-dfs_samples", "evaluation.latency.queries=0")
    explored = manifests(folder, "explore")
    # Every query of the splits that has rollouts, and nothing that was tried here.
    assert sum(m["counts"]["queries"] for m in explored) <= len({row["id"] for row in rows})
    assert all("rollouts" in m["config"] for m in explored)
    pairs = manifests(folder, "pairs")
    # Of the four rollouts of a query, each but no pruning and one layer differ in score or in size: six pairs.
    assert {m["counts"]["pairs"] / m["counts"]["queries_with_pairs"] for m in pairs} == {6.0}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("stage=import",), r"stage=import needs source"),
        (("stage=import", "source=conf"), r"source='conf' is neither a folder nor in the local cache"),
        (("stage=import", "source=empty"), r"source=empty holds nothing to import; allowed: adapter_0.pth"),
        (("router.folder=empty", "stage=router"), r"holds no router"),
        (
            ("router.folder=ROUTER", "model.num_layers=5", "evaluation.static=[]"),
            r"chooses among 4 layers, but tiny-llama-5x32 has 5",
        ),
        (("exploration.folder=ROLLOUTS", "exploration.score=ast_match", "stage=explore"), r"scored by json_match; allowed"),
    ],
)
def test_what_cannot_be_used_is_said(published, monkeypatch, settings, said):
    folder, imported, _, _ = published

    def offline(name, repo_type, revision):
        raise OSError("offline")

    monkeypatch.setattr("dynprune.stages.thesis_import.snapshot_download", offline)
    (folder / "empty").mkdir(exist_ok=True)
    places = {"ROUTER": imported / "routers/router-dpo", "ROLLOUTS": imported / "rollouts/data-dfs_samples"}
    typed = [setting.replace(name, str(place)) for setting in settings for name, place in places.items() if name in setting]
    typed += [setting for setting in settings if not any(name in setting for name in places)]
    with pytest.raises(ValueError, match=said):
        run_tiny(folder, "refused", *typed)


def test_rollouts_come_from_a_repository_of_data_sets_too(published, monkeypatch):
    folder, imported, _, _ = published

    def download(name, repo_type, revision):
        if repo_type == "model":
            raise OSError("no such model")
        assert (name, revision) == ("sinap/rollouts", "v1")
        return str(folder / "published/data")

    monkeypatch.setattr("dynprune.stages.thesis_import.snapshot_download", download)
    run_tiny(folder, "data", "stage=import", "source=sinap/rollouts", "source_revision=v1")
    one, other = imported / "rollouts/data-dfs_samples", folder / "outputs/data/imported/rollouts/dfs_samples"
    assert list(read_rollouts(one)) == list(read_rollouts(other))


def test_scores_that_are_no_shares_are_those_of_the_partial_match(tmp_path):
    Dataset.from_list([{"id": s, "pruned_layers": [1], "score": s} for s in (-5.0, 10.0)]).save_to_disk(tmp_path / "data/dfs")
    typed = ("stage=import", f"source={tmp_path}/data")
    with pytest.raises(
        ValueError, match=r"dfs has scores from -5 to 10, but exploration\.score=json_match goes from 0 to 1; .+type"
    ):
        run_tiny(tmp_path, "run", *typed)
    run_tiny(tmp_path, "run", *typed, "exploration.score=partial_match")
    assert read_header(tmp_path / "outputs/run/imported/rollouts/dfs").score == "partial_match"


def test_rollouts_of_other_queries_are_of_no_use(published, tmp_path):
    folder, _, _, _ = published
    RolloutWriter(tmp_path / "other", L, "json_match").append([Rollout("somebody_elses", (), 1.0, "said")])
    with pytest.raises(ValueError, match=r"has no rollout of the \d+ queries of the train split"):
        run_tiny(folder, "refused", f"exploration.folder={tmp_path}/other", "stage=explore")


def test_a_state_that_does_not_fit_is_named(published, tmp_path):
    state = trained_router().state_dict()
    cut = {name.replace("encoder.model.", "bert."): value for name, value in state.items() if "ratio_mu" not in name}
    (tmp_path / "cut").mkdir()
    torch.save(cut, tmp_path / "cut/router.pt")
    with pytest.raises(ValueError, match=r"router.pt lacks \['ratio_mu.weight', 'ratio_mu.bias'\]"):
        run_tiny(tmp_path, "cut", "stage=import", f"source={tmp_path}/cut")
