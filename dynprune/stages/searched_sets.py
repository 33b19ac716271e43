"""Searches of static sets, on all train queries or on groups of similar ones, and the losses under what they find.

Each is an artifact. All searches begin alike, with the loss of each query with each layer alone, which is measured once.

Axis suffixes: Q = queries, B = queries of a batch, S = sets, L = layers.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dynprune.artifacts import Artifact
from dynprune.atomic import Pieces, replacing
from dynprune.baselines.by_embedding import cluster
from dynprune.baselines.static_search import accurate_static_sets, greedy_static_sets
from dynprune.data.tasks import Query
from dynprune.slm.likelihood import score_configurations, similar_samples
from dynprune.slm.pruning import LayerPruner
from dynprune.stages.adapters import adapters, pruner_of, upstream_of
from dynprune.stages.embeddings import embedding_identity, embeddings
from dynprune.stages.progress import track
from dynprune.stages.run import Run, digest, once_a_run
from dynprune.stages.sizes import sizes_of

VERSION = 1
_LOSSES = "losses"
# A set, and the figure that it was chosen by.
_Found = tuple[tuple[int, ...], float]
SEARCHED = ("static_accuracy", "nearest_centroid", "pudding")
"""The baselines that search sets among ``evaluation.static_candidates`` layers, as the rows of ``evaluation.static`` do."""


@once_a_run
def static_sets(run: Run) -> Artifact:
    """Searches the static sets up to the largest size that the table asks for."""
    largest = max(run.config.evaluation.static)

    def search(pruner: LayerPruner, queries: Sequence[Query], begun: tuple[int, ...]) -> Iterator[_Found]:
        return _greedy(run, pruner, queries, largest, begun)

    return _searched(run, "static", largest, "nats_per_token", search, {}, None)


@once_a_run
def accurate_sets(run: Run) -> Artifact:
    """Searches the static sets by accuracy, up to the largest size that the table asks for."""
    own = run.config.evaluation.baselines.static_accuracy
    validation = run.queries("validation", own.max_queries, "evaluation.baselines.static_accuracy.max_queries")
    largest = max(own.sizes)

    def search(pruner: LayerPruner, queries: Sequence[Query], begun: tuple[int, ...]) -> Iterator[_Found]:
        return accurate_static_sets(
            run.slm,
            pruner,
            [run.tokens(query) for query in queries],
            _nats_alone(run, queries),
            [run.tokens(query) for query in validation],
            largest,
            run.config.evaluation.static_candidates,
            own.finalists,
            begun,
        )

    return _searched(run, "static_accuracy", largest, "accuracy", search, {"finalists": own.finalists}, validation)


@once_a_run
def _library(run: Run) -> Artifact:
    """Searches static sets on groups of train queries, up to the largest size that a baseline chooses from.

    PuDDing's are searched on different tasks. Clusters of the embeddings stand in for them here, so that the sets differ in
    what kinds of queries need; sets of random tenths would differ by chance alone.
    """
    settings = run.config.evaluation
    groups, seed = settings.baselines.library.groups, run.config.seed
    queries = library_queries(run)
    largest = max(library_sizes(run))

    def build(folder: Path) -> dict[str, Any]:
        _, group_Q = cluster(embeddings(run, queries), groups, seed, "evaluation.baselines.library.groups")
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

    config = {**_search_config(run, largest), "groups": groups, "seed": seed, **embedding_identity(run)}
    return run.store.get_or_build(
        "library", VERSION, config, digest(queries), upstream_of(adapters(run)), build, resumable=True
    )


@once_a_run
def library_losses(run: Run) -> Artifact:
    """Measures the loss of each query of the library under each of its sets, in nats a token."""
    queries, library = library_queries(run), _library(run)
    sizes = library_sizes(run)

    def build(folder: Path) -> dict[str, Any]:
        groups = [json.loads(path.read_text(encoding="utf-8")) for path in library.folder.glob("group-*.json")]
        sets = sorted({tuple(layers) for group in groups for layers in group["sets"] if len(layers) in sizes})
        with replacing(folder / "sets.json") as path:
            path.write_text(json.dumps(sets), encoding="utf-8")
        _measure(run, folder, queries, sets, "measuring the sets of the library")
        return {"queries": len(queries), "sets": len(sets)}

    upstream = {"library": library.fingerprint}
    return run.store.get_or_build("losses", VERSION, {"sizes": sizes}, digest(queries), upstream, build, resumable=True)


def library_queries(run: Run) -> list[Query]:
    """The train queries that the library is searched on."""
    limit = run.config.evaluation.baselines.library.max_queries
    return run.queries("train", limit, "evaluation.baselines.library.max_queries")


def library_sizes(run: Run) -> list[int]:
    """The sizes that baselines choose from the library."""
    return sorted({*sizes_of(run, "nearest_centroid"), *sizes_of(run, "pudding")})


def _searched(
    run: Run,
    stage: str,
    largest: int,
    figure: str,
    search: Callable[[LayerPruner, Sequence[Query], tuple[int, ...]], Iterator[_Found]],
    own: Mapping[str, Any],
    validation: Sequence[Query] | None,
) -> Artifact:
    """Static sets of all sizes, and the figure that each was chosen by.

    Args:
        run: The run.
        stage: The artifact's stage.
        largest: Size of the largest set.
        figure: Name of the figure.
        search: Yields the sets, from the pruner, queries of the train split and the set to go on from.
        own: What of the search's settings is its own.
        validation: Queries that it reads beside those of the train split.
    """
    queries = run.queries("train", run.config.evaluation.static_samples, "evaluation.static_samples")

    def build(folder: Path) -> dict[str, Any]:
        # Not inside: a pruner has the SLM for itself.
        _alone(run)
        target = folder / "sets.json"
        sets = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
        begun = tuple(sets[str(len(sets))]["layers"]) if sets else ()
        with pruner_of(run, adapters(run)) as pruner:
            what = "searching static sets" if validation is None else "searching static sets by accuracy"
            for layers, value in track(search(pruner, queries, begun), what, largest - len(begun)):
                sets[str(len(layers))] = {"layers": list(layers), figure: value}
                with replacing(target) as path:
                    path.write_text(json.dumps(sets, indent=2), encoding="utf-8")
        counts = {} if validation is None else {"validation_queries": len(validation)}
        return {"sets": len(sets), "queries": len(queries), **counts}

    data = digest(queries) if validation is None else {"train": digest(queries), "validation": digest(validation)}
    config = {**_search_config(run, largest), **own}
    return run.store.get_or_build(stage, VERSION, config, data, upstream_of(adapters(run)), build, resumable=True)


def _greedy(
    run: Run, pruner: LayerPruner, queries: Sequence[Query], largest: int, begun: tuple[int, ...] = ()
) -> Iterator[_Found]:
    return greedy_static_sets(
        run.slm,
        pruner,
        [run.tokens(query) for query in queries],
        _nats_alone(run, queries),
        largest,
        run.config.evaluation.static_candidates,
        begun,
    )


def _nats_alone(run: Run, queries: Sequence[Query]) -> list[float]:
    """What the answers to some of the searches' queries lose with each layer alone, in nats."""
    nats_per_token = read_losses(_alone(run).folder)
    nats_QL = np.array([nats_per_token[query.id] for query in queries])
    tokens_Q = np.array([len(run.tokens(query)[1]) + 1 for query in queries])
    nats_L: list[float] = (tokens_Q @ nats_QL).tolist()
    return nats_L


@once_a_run
def _alone(run: Run) -> Artifact:
    """Measures the loss of train queries with each layer pruned alone, in nats a token: the first step of every search."""
    settings = run.config.evaluation
    searched = []
    if settings.static or sizes_of(run, "static_accuracy"):
        searched.append(run.queries("train", settings.static_samples, "evaluation.static_samples"))
    if library_sizes(run):
        searched.append(library_queries(run))
    # All are the first queries of the split.
    queries = max(searched, key=len)

    def build(folder: Path) -> dict[str, Any]:
        _measure(run, folder, queries, [(layer,) for layer in range(run.slm.num_layers)], "measuring each layer alone")
        return {"queries": len(queries)}

    config = {"model": run.model_identity}
    return run.store.get_or_build("alone", VERSION, config, digest(queries), upstream_of(adapters(run)), build, resumable=True)


def _measure(run: Run, folder: Path, queries: Sequence[Query], sets: Sequence[Sequence[int]], title: str) -> None:
    """Measures the loss of each query under each set, in nats a token, where an earlier attempt has not."""
    done = read_losses(folder)
    left = [query for query in queries if query.id not in done]
    samples = [run.tokens(query) for query in left]
    pieces = Pieces(folder, _LOSSES)
    with pruner_of(run, adapters(run)) as pruner:
        measured = score_configurations(run.slm, pruner, samples, sets)
        batches = track(measured, title, len(similar_samples(run.slm, samples)))
        for positions, scores in batches:
            loss_BS = torch.stack([scored.nats_per_token_B for scored in scores], dim=1).tolist()
            losses = {left[position].id: loss_S for position, loss_S in zip(positions, loss_BS, strict=True)}
            pieces.add(json.dumps(losses))


def read_losses(folder: Path) -> dict[str, list[float]]:
    """The losses in an artifact, in nats a token: by query id, one for each set."""
    losses: dict[str, list[float]] = {}
    for piece in Pieces(folder, _LOSSES).read():
        losses |= json.loads(piece)
    return losses


def _search_config(run: Run, largest: int) -> dict[str, Any]:
    return {"model": run.model_identity, "largest": largest, "candidates": run.config.evaluation.static_candidates}
