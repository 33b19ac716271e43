"""The rows of the baselines.

What takes long is an artifact: each search, the losses of train queries under the sets of the library, and each choice.

Axis suffixes: Q = queries, B = queries of a batch, S = sets, E = embedding size, L = layers.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from dynprune.artifacts import Artifact
from dynprune.atomic import replacing
from dynprune.baselines.block_influence import block_influence, least_influential
from dynprune.baselines.by_embedding import Array, LinearChoice, cluster, loss_regression, nearest_centroid
from dynprune.baselines.oracle import oracle
from dynprune.baselines.static_search import accurate_static_sets, greedy_static_sets
from dynprune.baselines.unsearched import last_layers, random_sets
from dynprune.data.hidden_states import HiddenStateStream
from dynprune.data.prompts import render_router_input
from dynprune.data.rollouts import Rollout, read_rollouts
from dynprune.data.tasks import Query
from dynprune.evaluation.accuracy import RIGHT_BY, Sample
from dynprune.evaluation.latency import Chooser
from dynprune.router.encoder import TextEncoder
from dynprune.slm.likelihood import score_configurations, similar_samples
from dynprune.slm.pruning import LayerPruner
from dynprune.stages.adapters import adapters, pruner_of, upstream_of
from dynprune.stages.explore import explore
from dynprune.stages.progress import track
from dynprune.stages.rows import Row
from dynprune.stages.run import Run, content_digest, digest, once_a_run, plain

VERSION = 1
_EMBEDDED_TOGETHER = 64


def baseline_rows(run: Run) -> Iterator[Row]:
    """The rows of the static sets, and of the baselines that the configuration names sizes for, but for the oracle's."""
    # Its rows come last; what is wrong with their sizes is said before the others are searched for.
    _sizes(run, "oracle")
    if run.config.evaluation.static:
        yield from static_rows(run)
    for name, rows in _BASELINES.items():
        sizes = _sizes(run, name)
        if sizes:
            yield from rows(run, sizes)


def static_rows(run: Run) -> Iterator[Row]:
    """The rows of the static sets that likelihood finds."""
    sizes = _possible(run, "evaluation.static", plain(run.config.evaluation.static), least=1)
    yield from _set_rows("static", static_sets(run), sizes)


@once_a_run
def static_sets(run: Run) -> Artifact:
    """Searches the static sets up to the largest size that the table asks for."""
    largest = max(run.config.evaluation.static)

    def search(pruner: LayerPruner, queries: Sequence[Query]) -> Iterator[tuple[tuple[int, ...], float]]:
        return _greedy(run, pruner, queries, largest)

    return _searched(run, "static", largest, "nats_per_token", search, {}, None)


def _static_accuracy(run: Run, sizes: Sequence[int]) -> Iterator[Row]:
    own = run.config.evaluation.baselines.static_accuracy
    validation = run.queries("validation", own.max_queries, "evaluation.baselines.static_accuracy.max_queries")
    largest = max(sizes)

    def search(pruner: LayerPruner, queries: Sequence[Query]) -> Iterator[tuple[tuple[int, ...], float]]:
        return accurate_static_sets(
            run.slm,
            pruner,
            [run.tokens(query) for query in queries],
            _nats_alone(run, queries),
            [run.tokens(query) for query in validation],
            largest,
            run.config.evaluation.static_candidates,
            own.finalists,
        )

    artifact = _searched(run, "static_accuracy", largest, "accuracy", search, {"finalists": own.finalists}, validation)
    yield from _set_rows("static_accuracy", artifact, sizes)


def _searched(
    run: Run,
    stage: str,
    largest: int,
    figure: str,
    search: Callable[[LayerPruner, Sequence[Query]], Iterator[tuple[tuple[int, ...], float]]],
    own: Mapping[str, Any],
    validation: Sequence[Query] | None,
) -> Artifact:
    """Static sets of all sizes, and the figure that each was chosen by.

    Args:
        run: The run.
        stage: The artifact's stage.
        largest: Size of the largest set.
        figure: Name of the figure.
        search: Yields the sets, from the pruner and queries of the train split.
        own: What of the search's settings is its own.
        validation: Queries that it reads beside those of the train split.
    """
    queries = run.queries("train", run.config.evaluation.static_samples, "evaluation.static_samples")

    def build(folder: Path) -> dict[str, Any]:
        # Not inside: a pruner has the SLM for itself.
        _alone(run)
        with pruner_of(run, adapters(run)) as pruner:
            found = search(pruner, queries)
            what = "searching static sets" if validation is None else "searching static sets by accuracy"
            sets = {str(len(layers)): {"layers": list(layers), figure: value} for layers, value in track(found, what, largest)}
        with replacing(folder / "sets.json") as path:
            path.write_text(json.dumps(sets, indent=2), encoding="utf-8")
        counts = {} if validation is None else {"validation_queries": len(validation)}
        return {"sets": len(sets), "queries": len(queries), **counts}

    data = digest(queries) if validation is None else {"train": digest(queries), "validation": digest(validation)}
    config = {**_search_config(run, largest), **own}
    return run.store.get_or_build(stage, VERSION, config, data, upstream_of(adapters(run)), build, resumable=False)


def _greedy(run: Run, pruner: LayerPruner, queries: Sequence[Query], largest: int) -> Iterator[tuple[tuple[int, ...], float]]:
    return greedy_static_sets(
        run.slm,
        pruner,
        [run.tokens(query) for query in queries],
        _nats_alone(run, queries),
        largest,
        run.config.evaluation.static_candidates,
    )


def _nats_alone(run: Run, queries: Sequence[Query]) -> list[float]:
    """What the answers to some of the searches' queries lose with each layer alone, in nats."""
    nats_per_token = _read_losses(_alone(run).folder)
    nats_QL = np.array([nats_per_token[query.id] for query in queries])
    tokens_Q = np.array([len(run.tokens(query)[1]) + 1 for query in queries])
    nats_L: list[float] = (tokens_Q @ nats_QL).tolist()
    return nats_L


@once_a_run
def _alone(run: Run) -> Artifact:
    """Measures the loss of train queries with each layer pruned alone, in nats a token: the first step of every search."""
    settings = run.config.evaluation
    searched = []
    if settings.static or _sizes(run, "static_accuracy"):
        searched.append(run.queries("train", settings.static_samples, "evaluation.static_samples"))
    if _library_sizes(run):
        searched.append(_library_queries(run))
    # All are the first queries of the split.
    queries = max(searched, key=len)

    def build(folder: Path) -> dict[str, Any]:
        _measure(run, folder, queries, [(layer,) for layer in range(run.slm.num_layers)], "measuring each layer alone")
        return {"queries": len(queries)}

    config = {"model": run.model_identity}
    return run.store.get_or_build("alone", VERSION, config, digest(queries), upstream_of(adapters(run)), build, resumable=True)


def _measure(run: Run, folder: Path, queries: Sequence[Query], sets: Sequence[Sequence[int]], title: str) -> None:
    """Measures the loss of each query under each set, in nats a token, where an earlier attempt has not."""
    done = _read_losses(folder)
    left = [query for query in queries if query.id not in done]
    samples = [run.tokens(query) for query in left]
    parts = len(list(folder.glob("losses-*.json")))
    with pruner_of(run, adapters(run)) as pruner:
        measured = score_configurations(run.slm, pruner, samples, sets)
        batches = track(measured, title, len(similar_samples(run.slm, samples)))
        for part, (positions, scores) in enumerate(batches, start=parts):
            loss_BS = torch.stack([scored.nats_per_token_B for scored in scores], dim=1).tolist()
            losses = {left[position].id: loss_S for position, loss_S in zip(positions, loss_BS, strict=True)}
            with replacing(folder / f"losses-{part:05d}.json") as path:
                path.write_text(json.dumps(losses), encoding="utf-8")


def _block_influence(run: Run, sizes: Sequence[int]) -> Iterator[Row]:
    queries = run.queries("train", run.config.evaluation.static_samples, "evaluation.static_samples")
    batch_tokens = run.config.evaluation.baselines.block_influence.batch_tokens

    def build(folder: Path) -> dict[str, Any]:
        sequences = [[*prompt, *answer] for prompt, answer in map(run.tokens, queries)]
        stream = HiddenStateStream(run.slm, sequences, batch_tokens, None)
        influence_L = block_influence(track(stream, "measuring block influence", len(stream)))
        with replacing(folder / "influence.json") as path:
            path.write_text(json.dumps(influence_L.tolist()), encoding="utf-8")
        return {"queries": len(queries), "tokens": sum(map(len, sequences))}

    # That of the unpruned SLM, in which there are no adapters.
    config = {"model": run.model_identity, "batch_tokens": batch_tokens}
    artifact = run.store.get_or_build("block_influence", VERSION, config, digest(queries), {}, build, resumable=False)
    influence_L = torch.tensor(json.loads((artifact.folder / "influence.json").read_text(encoding="utf-8")), dtype=torch.double)
    for size in sizes:
        yield _fixed("block_influence", str(size), least_influential(influence_L, size))


def _last(run: Run, sizes: Sequence[int]) -> Iterator[Row]:
    for size in sizes:
        yield _fixed("last", str(size), last_layers(run.slm.num_layers, size))


def _random(run: Run, sizes: Sequence[int]) -> Iterator[Row]:
    draws = run.config.evaluation.baselines.random.draws
    for size in sizes:
        for number, layers in enumerate(random_sets(run.slm.num_layers, size, draws, run.config.seed), start=1):
            yield _fixed("random", f"{size}-{number}", layers)


def _nearest_centroid(run: Run, sizes: Sequence[int]) -> Iterator[Row]:
    clusters, seed = run.config.evaluation.baselines.nearest_centroid.clusters, run.config.seed

    def fit(embedding_QE: Array, loss_QS: Array, sets: Sequence[Sequence[int]]) -> LinearChoice:
        return nearest_centroid(embedding_QE, loss_QS, sets, clusters, seed)

    yield from _choice_rows(run, "nearest_centroid", sizes, {"clusters": clusters, "seed": seed}, fit)


def _pudding(run: Run, sizes: Sequence[int]) -> Iterator[Row]:
    yield from _choice_rows(run, "pudding", sizes, {}, loss_regression)


def oracle_names(run: Run) -> list[str]:
    """The names of the oracle's rows."""
    return [f"oracle-{size:g}" for size in _sizes(run, "oracle")]


def oracle_rows(run: Run, queries: Sequence[Query], samples: Mapping[str, Sequence[Sample]]) -> Iterator[Row]:
    """The rows of the oracle, which chooses for each query among all configurations that were tried on it.

    Args:
        run: The run.
        queries: The test queries.
        samples: What the other rows under the same adapters said.
    """
    sizes = _sizes(run, "oracle")
    if not sizes:
        return
    tried: dict[str, dict[tuple[int, ...], Rollout]] = {query.id: {} for query in queries}
    if run.config.evaluation.baselines.oracle.explore:
        artifact = explore(run.with_changes(_for_the_oracle(run.config)), "test")
        for rollout in read_rollouts(artifact.folder):
            tried[rollout.id][rollout.pruned_layers] = rollout
    for said in samples.values():
        for sample in said:
            score = sample.scores[RIGHT_BY]
            tried[sample.id][sample.pruned_layers] = Rollout(sample.id, sample.pruned_layers, score, sample.output)
    # In an order of their own: among equals the first is taken, which must not hang on the order of the rows.
    options = [[rollout for _, rollout in sorted(tried[query.id].items())] for query in queries]
    for name, size in zip(oracle_names(run), sizes, strict=True):
        layers_of = {rollout.id: rollout.pruned_layers for rollout in oracle(options, size)}
        origin = hashlib.sha256(json.dumps(layers_of, sort_keys=True).encode()).hexdigest()
        yield Row(name, _looked_up(layers_of), origin, curve="oracle")


def _for_the_oracle(config: DictConfig) -> DictConfig:
    """The run's exploration, but of the score that the table reports, and of queries too that the unpruned SLM gets wrong."""
    changed = config.copy()
    changed.exploration.score = RIGHT_BY
    if "require_success" in changed.exploration.strategy:
        changed.exploration.strategy.require_success = None
    return changed


_BASELINES: Mapping[str, Callable[[Run, Sequence[int]], Iterator[Row]]] = {
    "static_accuracy": _static_accuracy,
    "block_influence": _block_influence,
    "last": _last,
    "random": _random,
    "nearest_centroid": _nearest_centroid,
    "pudding": _pudding,
}


SEARCHED = ("static_accuracy", "nearest_centroid", "pudding")
"""The baselines that search sets among ``evaluation.static_candidates`` layers, as the rows of ``evaluation.static`` do."""


@once_a_run
def _library(run: Run) -> Artifact:
    """Searches static sets on groups of train queries, up to the largest size that a baseline chooses from.

    PuDDing's are searched on different tasks. Clusters of the embeddings stand in for them here, so that the sets differ in
    what kinds of queries need; sets of random tenths would differ by chance alone.
    """
    settings = run.config.evaluation
    groups, seed = settings.baselines.library.groups, run.config.seed
    queries = _library_queries(run)
    largest = max(_library_sizes(run))

    def build(folder: Path) -> dict[str, Any]:
        _, group_Q = cluster(_embeddings(run, queries), groups, seed, "evaluation.baselines.library.groups")
        numbers = sorted(set(group_Q.tolist()))
        # Not inside: a pruner has the SLM for itself.
        _alone(run)
        with pruner_of(run, adapters(run)) as pruner:
            for number in track(numbers, "searching the library of sets", len(numbers)):
                target = folder / f"group-{number:03d}.json"
                if target.exists():
                    continue
                members = [query for query, group in zip(queries, group_Q, strict=True) if group == number]
                search = _greedy(run, pruner, members, largest)
                record = {"queries": [query.id for query in members], "sets": [list(layers) for layers, _ in search]}
                with replacing(target) as path:
                    path.write_text(json.dumps(record), encoding="utf-8")
        return {"groups": len(numbers), "queries": len(queries)}

    config = {**_search_config(run, largest), "groups": groups, "seed": seed, **_encoder_identity(run)}
    return run.store.get_or_build(
        "library", VERSION, config, digest(queries), upstream_of(adapters(run)), build, resumable=True
    )


@once_a_run
def _losses(run: Run) -> Artifact:
    """Measures the loss of each query of the library under each of its sets, in nats a token."""
    queries, library = _library_queries(run), _library(run)
    sizes = _library_sizes(run)

    def build(folder: Path) -> dict[str, Any]:
        groups = [json.loads(path.read_text(encoding="utf-8")) for path in library.folder.glob("group-*.json")]
        sets = sorted({tuple(layers) for group in groups for layers in group["sets"] if len(layers) in sizes})
        with replacing(folder / "sets.json") as path:
            path.write_text(json.dumps(sets), encoding="utf-8")
        _measure(run, folder, queries, sets, "measuring the sets of the library")
        return {"queries": len(queries), "sets": len(sets)}

    upstream = {"library": library.fingerprint}
    return run.store.get_or_build("losses", VERSION, {"sizes": sizes}, digest(queries), upstream, build, resumable=True)


def _read_losses(folder: Path) -> dict[str, list[float]]:
    losses: dict[str, list[float]] = {}
    for path in sorted(folder.glob("losses-*.json")):
        losses |= json.loads(path.read_text(encoding="utf-8"))
    return losses


def _choice_rows(
    run: Run,
    name: str,
    sizes: Sequence[int],
    config: Mapping[str, Any],
    fit: Callable[[Array, Array, Sequence[Sequence[int]]], LinearChoice],
) -> Iterator[Row]:
    """The rows of a baseline that learns to choose from the library."""
    table = _losses(run)
    for size in sizes:

        def build(folder: Path, size: int = size) -> dict[str, Any]:
            queries = _library_queries(run)
            sets = json.loads((table.folder / "sets.json").read_text(encoding="utf-8"))
            columns = [column for column, layers in enumerate(sets) if len(layers) == size]
            losses = _read_losses(table.folder)
            loss_QS = np.array([losses[query.id] for query in queries])[:, columns]
            choice = fit(_embeddings(run, queries), loss_QS, [sets[column] for column in columns])
            choice.save(folder / "choice.npz")
            return {"queries": len(queries), "sets": len(columns)}

        identity = {"baseline": name, "size": size, **config}
        upstream = {"losses": table.fingerprint}
        artifact = run.store.get_or_build("choice", VERSION, identity, {}, upstream, build, resumable=False)
        choose = _by_embedding(run, LinearChoice.load(artifact.folder / "choice.npz"))
        yield Row(
            f"{name}-{size}",
            choose,
            artifact.fingerprint,
            router_layers=run.config.evaluation.router_cost_layers,
            curve=name,
        )


def _library_queries(run: Run) -> list[Query]:
    limit = run.config.evaluation.baselines.library.max_queries
    return run.queries("train", limit, "evaluation.baselines.library.max_queries")


def _library_sizes(run: Run) -> list[int]:
    return sorted({*_sizes(run, "nearest_centroid"), *_sizes(run, "pudding")})


@once_a_run
def _encoder(run: Run) -> TextEncoder:
    return TextEncoder(**plain(run.config.router.encoder)).to(run.slm.device).eval()


def _encoder_identity(run: Run) -> dict[str, Any]:
    settings = run.config.router.encoder
    return {"encoder": plain(settings), "encoder_content": content_digest(settings.name_or_path)}


@torch.inference_mode()
def _embeddings(run: Run, queries: Sequence[Query]) -> Array:
    encoder = _encoder(run)
    chunks = []
    for start in range(0, len(queries), _EMBEDDED_TOGETHER):
        features = encoder.tokenize([render_router_input(query) for query in queries[start : start + _EMBEDDED_TOGETHER]])
        chunks.append(encoder(**{name: tensor.to(run.slm.device) for name, tensor in features.items()}).double().cpu())
    return torch.cat(chunks).numpy()


def _by_embedding(run: Run, choice: LinearChoice) -> Chooser:
    # Loaded here, not while the first query is timed.
    _encoder(run)
    return lambda query: choice(_embeddings(run, [query])[0])


def _looked_up(layers_of: Mapping[str, tuple[int, ...]]) -> Chooser:
    return lambda query: layers_of[query.id]


def _fixed(curve: str, budget: str, layers: Sequence[int]) -> Row:
    return Row(f"{curve}-{budget}", lambda query: layers, str(list(layers)), curve=curve)


def _set_rows(name: str, artifact: Artifact, sizes: Sequence[int]) -> Iterator[Row]:
    sets = json.loads((artifact.folder / "sets.json").read_text(encoding="utf-8"))
    for size in sizes:
        yield _fixed(name, str(size), sets[str(size)]["layers"])


def _search_config(run: Run, largest: int) -> dict[str, Any]:
    return {"model": run.model_identity, "largest": largest, "candidates": run.config.evaluation.static_candidates}


def _sizes(run: Run, name: str) -> list[Any]:
    """The sizes that a baseline's rows shall have.

    Raises:
        ValueError: If a set cannot have so many layers.
    """
    sizes: list[Any] = plain(run.config.evaluation.baselines[name].sizes)
    # The oracle's is a mean over queries, so it may be any number from 0 on.
    return _possible(run, f"evaluation.baselines.{name}.sizes", sizes, least=0 if name == "oracle" else 1)


def _possible(run: Run, key: str, sizes: list[Any], least: int) -> list[Any]:
    num_layers = run.slm.num_layers
    for size in sizes:
        if not least <= size <= num_layers or (least and size != int(size)):
            raise ValueError(
                f"{key} asks for {size} layers, but {run.slm.name} has {num_layers}; allowed: {least} to {num_layers}; for "
                f"example {key}=[2,4]"
            )
    return sizes
