"""All baselines together on a tiny random model: their rows, and what of it is kept."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny import composed, samples_of, table_of

import dynprune.stages.searched_sets as searched_sets
from dynprune.data.rollouts import read_rollouts
from dynprune.data.tasks import Query
from dynprune.evaluation.accuracy import Sample
from dynprune.stages.adapters import adapters, pruner_of
from dynprune.stages.baselines import baseline_rows, oracle_rows
from dynprune.stages.report import report
from dynprune.stages.run import Run

pytestmark = pytest.mark.stages

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


def test_every_baseline_has_its_rows_and_the_oracle_those_after_the_routers(table):
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


def answered(row: str, layers: tuple[int, ...], right: Sequence[bool], queries: Sequence[Query]) -> list[Sample]:
    """What a row says that prunes the same layers for all queries."""
    return [
        Sample(query.id, layers, f"{row} of {query.id}", (), False, {"ast_match": float(correct)})
        for query, correct in zip(queries, right, strict=True)
    ]


def oracle_choices(run: Run, samples: dict[str, list[Sample]], queries: Sequence[Query]) -> dict[str, list[tuple[int, ...]]]:
    return {row.name: [tuple(row.choose(query)) for query in queries] for row in oracle_rows(run, queries, samples)}


def test_without_exploration_the_oracle_chooses_the_best_of_the_rows(table, folder):
    run = tiny_run(folder, "evaluation.baselines.oracle={sizes:[0,1.5],explore:false}")
    queries = run.queries("test", 4, "evaluation.max_queries")
    samples = {
        "original": answered("original", (), [True, True, True, False], queries),
        "one": answered("one", (2,), [True, False, False, False], queries),
        "two": answered("two", (0, 1), [False, False, True, False], queries),
    }
    chosen = oracle_choices(run, samples, queries)
    # Of the right answers the one with most layers; where none is right, most layers.
    assert chosen["oracle-0"] == [(2,), (), (0, 1), (0, 1)]
    # Six layers in all: one right answer has to go, that of the query where it is the only loss of two layers.
    assert sum(map(len, chosen["oracle-1.5"])) >= 6
    right = {(sample.id, sample.pruned_layers) for said in samples.values() for sample in said if sample.scores["ast_match"]}
    assert sum((query.id, layers) in right for query, layers in zip(queries, chosen["oracle-1.5"], strict=True)) == 2
    reversed_rows = dict(reversed(samples.items()))
    assert oracle_choices(run, reversed_rows, queries) == chosen


def test_with_exploration_the_oracle_chooses_among_the_rollouts_too(table, folder):
    run = tiny_run(folder, "evaluation.baselines.oracle.sizes=[0]")
    queries = run.queries("test", 4, "evaluation.max_queries")
    shards = [path.parent for path in (folder / "outputs/artifacts/explore").glob("*/manifest.json")]
    ids = {query.id for query in queries}
    explored = [rollout for shard in shards for rollout in read_rollouts(shard) if rollout.id in ids]
    deepest = {id: max(len(rollout.pruned_layers) for rollout in explored if rollout.id == id) for id in ids}
    # No rollout is right on this model: what a row gets right is better, and else the deepest rollout is as good as any.
    assert {rollout.id for rollout in explored} == ids
    assert {rollout.score for rollout in explored} == {0.0}
    samples = {"one": answered("one", (2,), [True, False, False, False], queries)}
    [chosen] = oracle_choices(run, samples, queries).values()
    assert chosen[0] == (2,)
    assert [len(layers) for layers in chosen[1:]] == [deepest[query.id] for query in queries[1:]]


def test_the_first_step_of_a_search_is_the_loss_with_each_layer_alone(table, folder):
    run = tiny_run(folder, *EVERY)
    queries = run.queries("train", run.config.evaluation.static_samples, "evaluation.static_samples")
    # Else the mean over queries would be that over tokens.
    assert len({len(run.tokens(query)[1]) for query in queries}) > 1
    losses = []
    with pruner_of(run, adapters(run)) as pruner:
        for layer in range(4):
            pruner.prune([layer])
            nats, tokens = 0.0, 0
            for query in queries:
                prompt, answer = run.tokens(query)
                target = torch.tensor([*answer, run.slm.tokenizer.eos_token_id])
                logits = run.slm.model(input_ids=torch.tensor([[*prompt, *target]]), use_cache=False).logits[
                    0, len(prompt) - 1 : -1
                ]
                nats += torch.nn.functional.cross_entropy(logits, target, reduction="sum").item()
                tokens += len(target)
            losses.append(nats / tokens)
    [path] = [path for path in (folder / "outputs/artifacts/static").glob("*/sets.json") if "2" in json.loads(path.read_text())]
    found = json.loads(path.read_text())["1"]
    assert found["layers"] == [losses.index(min(losses))]
    assert found["nats_per_token"] == pytest.approx(min(losses), rel=1e-4)


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
    original, done = searched_sets.greedy_static_sets, []

    def stopped(*arguments):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(arguments)
        return original(*arguments)

    # Adapters are there already; another number of groups makes another library.
    changed = [*CHOICES, "evaluation.static=[]", "evaluation.baselines.library.groups=4"]
    monkeypatch.setattr(searched_sets, "greedy_static_sets", stopped)
    with pytest.raises(KeyboardInterrupt):
        list(baseline_rows(tiny_run(folder, *changed)))
    [partial] = (folder / "outputs/artifacts/library").glob("*.partial")
    [kept] = partial.glob("group-*.json")
    content = kept.read_text()
    calls = []
    monkeypatch.setattr(searched_sets, "greedy_static_sets", lambda *a: calls.append(a) or original(*a))
    assert [row.name for row in baseline_rows(tiny_run(folder, *changed))] == ["nearest_centroid-2", "pudding-1", "pudding-2"]
    assert len(calls) == 3
    assert (partial.with_suffix("") / kept.name).read_text() == content


def test_a_measurement_of_the_losses_that_is_stopped_goes_on_where_it_was(table, folder, monkeypatch):
    original = searched_sets.score_configurations
    asked = []

    def stopped(slm, pruner, samples, *others):
        asked.append(len(samples))
        for number, batch in enumerate(original(slm, pruner, samples, *others)):
            if number == 2 and len(asked) == 1:
                raise KeyboardInterrupt
            yield batch

    # How many samples are run together is not what an artifact depends on: the losses are the same but for rounding.
    monkeypatch.setattr("dynprune.slm.likelihood.tokens_at_once", lambda slm: 1)
    changed = [*CHOICES, "evaluation.static=[]", "evaluation.baselines.library.groups=2"]
    monkeypatch.setattr(searched_sets, "score_configurations", stopped)
    with pytest.raises(KeyboardInterrupt):
        list(baseline_rows(tiny_run(folder, *changed)))
    list(baseline_rows(tiny_run(folder, *changed)))
    assert asked == [9, 7]
    losses = [searched_sets.read_losses(path.parent) for path in (folder / "outputs/artifacts/losses").glob("*/sets.json")]
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
