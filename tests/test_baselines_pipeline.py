"""All baselines together on a tiny random model: their rows, and what of it is kept."""

import json
from pathlib import Path

import pytest
from tiny import composed, manifests, samples_of, table_of

import dynprune.stages.baselines as baselines
from dynprune.data.rollouts import read_rollouts
from dynprune.stages.baselines import baseline_rows
from dynprune.stages.evaluate import evaluate
from dynprune.stages.report import report
from dynprune.stages.run import Run

CHOICES = [
    "evaluation.baselines.library={max_queries:9,groups:3}",
    "evaluation.baselines.nearest_centroid={sizes:[2],clusters:2}",
    "evaluation.baselines.pudding.sizes=[1,2]",
]
EVERY = [
    "evaluation.baselines.static_accuracy={sizes:[1,2],finalists:2,max_queries:3}",
    "evaluation.baselines.block_influence={sizes:[1,3]}",
    "evaluation.baselines.last.sizes=[1,2]",
    "evaluation.baselines.random={sizes:[2],draws:2}",
    *CHOICES,
    "evaluation.baselines.oracle.sizes=[0,0.5]",
]
NAMES = [
    *("static-1", "static-2", "static_accuracy-1", "static_accuracy-2", "block_influence-1", "block_influence-3"),
    *("last-1", "last-2", "random-2-1", "random-2-2", "nearest_centroid-2", "pudding-1", "pudding-2"),
]
ORACLES = ["oracle-0", "oracle-0.5"]


def tiny_run(folder: Path, *overrides: str) -> Run:
    places = [f"paths.run={folder / 'outputs/run'}", f"paths.artifacts={folder / 'outputs/artifacts'}"]
    return Run(composed("experiment=tiny", "evaluation.max_queries=4", *places, *overrides))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("baselines")


@pytest.fixture(scope="module")
def table(folder) -> dict[str, dict]:
    report(tiny_run(folder, *EVERY, "evaluation.latency.queries=1", "evaluation.latency.warmup=0"))
    return table_of(folder, "run")


def configurations(folder: Path, row: str) -> dict[str, tuple[int, ...]]:
    return {sample["id"]: tuple(sample["pruned_layers"]) for sample in samples_of(folder, "run", row)}


def test_every_baseline_has_its_rows_between_the_original_and_the_router(table):
    assert list(table) == ["original", *NAMES, "router-dpo", *ORACLES]
    for name in NAMES:
        # Of each the size stands first among its numbers.
        size = int(name.split("-")[1])
        assert table[name]["mean_pruned_layers"] == size
        cost = 1 if name.startswith(("nearest_centroid", "pudding")) else 0
        assert table[name]["nominal_speedup"] == (size - cost) / 4
    assert all(row["timed"] == 1 for row in table.values())


def test_fixed_baselines_prune_the_same_layers_for_all_queries(table, folder):
    sets = {}
    for name in NAMES[:10]:
        [sets[name]] = set(configurations(folder, name).values())
    assert (sets["last-1"], sets["last-2"]) == ((2,), (1, 2))
    assert sets["random-2-1"] != sets["random-2-2"]
    assert set(sets["static_accuracy-1"]) < set(sets["static_accuracy-2"])
    assert set(sets["block_influence-1"]) < set(sets["block_influence-3"])
    # Those that choose by embedding choose from the library.
    [library] = (folder / "outputs/artifacts/losses").glob("*/sets.json")
    for name in ("nearest_centroid-2", "pudding-1", "pudding-2"):
        assert set(configurations(folder, name).values()) <= {tuple(layers) for layers in json.loads(library.read_text())}


def test_the_oracle_takes_the_best_that_the_rows_and_the_exploration_tried(table, folder):
    chosen = configurations(folder, "oracle-0")
    shards = [path.parent for path in (folder / "outputs/artifacts/explore").glob("*/manifest.json")]
    explored = [rollout for shard in shards for rollout in read_rollouts(shard) if rollout.id in chosen]
    assert {rollout.id for rollout in explored} == set(chosen)
    tried = [(rollout.id, rollout.score, rollout.pruned_layers) for rollout in explored]
    for row in ["original", *NAMES, "router-dpo"]:
        tried += [
            (sample["id"], sample["scores"]["ast_match"], tuple(sample["pruned_layers"]))
            for sample in samples_of(folder, "run", row)
        ]
    for query, layers in chosen.items():
        best = max((score, len(pruned)) for id, score, pruned in tried if id == query)
        assert best in {(score, len(pruned)) for id, score, pruned in tried if (id, pruned) == (query, layers)}
    assert table["oracle-0.5"]["mean_pruned_layers"] >= 0.5
    # Rollouts alone, or rows alone, would be fewer.
    assert len({(id, pruned) for id, _, pruned in tried}) > len({(rollout.id, rollout.pruned_layers) for rollout in explored})


def test_without_exploration_the_oracle_chooses_among_the_rows(tmp_path):
    run = tiny_run(tmp_path, "evaluation.baselines.oracle={sizes:[1.5],explore:false}", "evaluation.static=[1,2]")
    evaluation = evaluate(run)
    layers = [sample.pruned_layers for sample in evaluation.samples["oracle-1.5"]]
    assert sum(map(len, layers)) >= 1.5 * len(layers)
    by_row = [evaluation.samples[row] for row in ("original", "static-1", "static-2", "router-dpo")]
    assert all(
        sample.pruned_layers in {said[i].pruned_layers for said in by_row}
        for i, sample in enumerate(evaluation.samples["oracle-1.5"])
    )
    explored = {manifest["data"]["queries"] for manifest in manifests(tmp_path, "explore")}
    assert len(evaluation.queries) not in explored


def test_the_same_rows_again_are_made_from_what_is_there(table, folder):
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (folder / "outputs/artifacts").rglob("*.json")}

    before = times()
    rows = list(baseline_rows(tiny_run(folder, *EVERY)))
    assert [row.name for row in rows] == NAMES
    queries = tiny_run(folder).queries("test", 4, "evaluation.max_queries")
    for row in rows:
        assert {query.id: tuple(row.choose(query)) for query in queries} == configurations(folder, row.name)
    assert times() == before


def test_a_search_of_the_library_that_is_stopped_goes_on_where_it_was(table, folder, monkeypatch):
    original, done = baselines.greedy_static_sets, []

    def stopped(*arguments):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(arguments)
        return original(*arguments)

    # Adapters are there already; another number of groups makes another library.
    changed = [*CHOICES, "evaluation.static=[]", "evaluation.baselines.library.groups=4"]
    monkeypatch.setattr(baselines, "greedy_static_sets", stopped)
    with pytest.raises(KeyboardInterrupt):
        list(baseline_rows(tiny_run(folder, *changed)))
    [partial] = (folder / "outputs/artifacts/library").glob("*.partial")
    [kept] = partial.glob("group-*.json")
    content = kept.read_text()
    calls = []
    monkeypatch.setattr(baselines, "greedy_static_sets", lambda *a: calls.append(a) or original(*a))
    assert [row.name for row in baseline_rows(tiny_run(folder, *changed))] == ["nearest_centroid-2", "pudding-1", "pudding-2"]
    assert len(calls) == 3
    assert (partial.with_suffix("") / kept.name).read_text() == content


def test_a_measurement_of_the_losses_that_is_stopped_goes_on_where_it_was(table, folder, monkeypatch):
    original = baselines.score_configurations
    asked = []

    def stopped(slm, pruner, samples, *others):
        asked.append(len(samples))
        for number, batch in enumerate(original(slm, pruner, samples, *others)):
            if number == 2 and len(asked) == 1:
                raise KeyboardInterrupt
            yield batch

    # The batch size is not what an artifact depends on: the losses are the same but for rounding.
    changed = [*CHOICES, "evaluation.static=[]", "evaluation.baselines.library.groups=2", "hardware.batch_size=2"]
    monkeypatch.setattr(baselines, "score_configurations", stopped)
    with pytest.raises(KeyboardInterrupt):
        list(baseline_rows(tiny_run(folder, *changed)))
    list(baseline_rows(tiny_run(folder, *changed)))
    assert asked == [9, 5]
    losses = [baselines._read_losses(path.parent) for path in (folder / "outputs/artifacts/losses").glob("*/sets.json")]
    assert [len(table) for table in losses] == [9] * len(losses)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("evaluation.baselines.last.sizes=[4]", "but the last one is never pruned; allowed: 1 to 3"),
        (
            "evaluation.baselines.block_influence.sizes=[5]",
            "sizes asks for 5 layers, but tiny-llama-4x32 has 4",
        ),
        ("evaluation.baselines.pudding.sizes=[0]", "pudding.sizes asks for 0 layers"),
        ("evaluation.baselines.oracle.sizes=[4.5]", "oracle.sizes asks for 4.5 layers"),
        ("evaluation.baselines.random={sizes:[3],draws:5}", "there are 4 sets of 3 of 4 layers"),
    ],
)
def test_impossible_sizes_end_in_one_sentence(folder, override, sentence):
    with pytest.raises(ValueError, match=sentence):
        list(baseline_rows(tiny_run(folder, "evaluation.static=[]", override)))
