"""The rows of the baselines.

What takes long is an artifact: the searches, see `dynprune.stages.searched_sets`, block influence, and each choice.

Axis suffixes: Q = queries, S = sets, E = embedding size, L = layers.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from dynprune.artifacts import Artifact
from dynprune.atomic import Pieces, replacing
from dynprune.baselines.block_influence import block_influence, least_influential, summed_cosines
from dynprune.baselines.by_embedding import Array, LinearChoice, loss_regression, nearest_centroid
from dynprune.baselines.oracle import oracle
from dynprune.baselines.unsearched import last_layers, random_sets
from dynprune.data.hidden_states import HiddenStateStream
from dynprune.data.rollouts import Rollout, read_rollouts
from dynprune.data.tasks import Query
from dynprune.evaluation.accuracy import RIGHT_BY, Sample
from dynprune.evaluation.latency import Chooser
from dynprune.stages.embeddings import embeddings, encoder_of
from dynprune.stages.explore import explore
from dynprune.stages.progress import track
from dynprune.stages.rows import Row
from dynprune.stages.run import Run, digest, plain
from dynprune.stages.searched_sets import accurate_sets, library_losses, library_queries, read_losses, static_sets
from dynprune.stages.sizes import possible, sizes_of

VERSION = 1
_INFLUENCE = "influence.json"


def baseline_rows(run: Run) -> Iterator[Row]:
    """The rows of the static sets, and of the baselines that the configuration names sizes for, but for the oracle's."""
    # Its rows come last; what is wrong with their sizes is said before the others are searched for.
    sizes_of(run, "oracle")
    if run.config.evaluation.static:
        yield from static_rows(run)
    for name, rows in _BASELINES.items():
        sizes = sizes_of(run, name)
        if sizes:
            yield from rows(run, sizes)


def static_rows(run: Run) -> Iterator[Row]:
    """The rows of the static sets that likelihood finds."""
    sizes = possible(run, "evaluation.static", plain(run.config.evaluation.static), least=1)
    yield from _set_rows("static", static_sets(run), sizes)


def _static_accuracy(run: Run, sizes: Sequence[int]) -> Iterator[Row]:
    yield from _set_rows("static_accuracy", accurate_sets(run), sizes)


def _block_influence(run: Run, sizes: Sequence[int]) -> Iterator[Row]:
    queries = run.queries("train", run.config.evaluation.static_samples, "evaluation.static_samples")
    batch_tokens = run.config.evaluation.baselines.block_influence.batch_tokens

    def build(folder: Path) -> dict[str, Any]:
        sequences = [[*prompt, *answer] for prompt, answer in map(run.tokens, queries)]
        stream = HiddenStateStream(run.slm, sequences, batch_tokens, None)
        pieces = Pieces(folder, "cosines")
        if not (folder / _INFLUENCE).exists():
            influence_L = block_influence(_cosines(stream, pieces))
            with replacing(folder / _INFLUENCE) as path:
                path.write_text(json.dumps(influence_L.tolist()), encoding="utf-8")
        pieces.remove()
        return {"queries": len(queries), "tokens": sum(map(len, sequences))}

    # That of the unpruned SLM, in which there are no adapters.
    config = {"model": run.model_identity, "batch_tokens": batch_tokens}
    artifact = run.store.get_or_build("block_influence", VERSION, config, digest(queries), {}, build, resumable=True)
    influence_L = torch.tensor(json.loads((artifact.folder / _INFLUENCE).read_text(encoding="utf-8")), dtype=torch.double)
    for size in sizes:
        yield _fixed("block_influence", str(size), least_influential(influence_L, size))


def _cosines(stream: HiddenStateStream, pieces: Pieces) -> Iterator[tuple[Tensor, int]]:
    """Of each batch, how alike the states are before and after each layer, and its tokens; it can be stopped."""
    measured: dict[int, tuple[list[float], int]] = {}
    for piece in pieces.read():
        number, cosine_L, tokens = json.loads(piece)
        measured[number] = cosine_L, tokens
    left = [number for number in range(len(stream)) if number not in measured]
    for number in track(left, "measuring block influence", len(left)):
        states_SNd = stream.batch(0, number)
        measured[number] = summed_cosines(states_SNd).tolist(), states_SNd.shape[1]
        pieces.add(json.dumps([number, *measured[number]]))
    # In one order, however often it was stopped: sums of floats hang on it.
    for number in range(len(stream)):
        cosine_L, tokens = measured[number]
        yield torch.tensor(cosine_L, dtype=torch.double), tokens


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
    return [f"oracle-{size:g}" for size in sizes_of(run, "oracle")]


def oracle_rows(run: Run, queries: Sequence[Query], samples: Mapping[str, Sequence[Sample]]) -> Iterator[Row]:
    """The rows of the oracle, which chooses for each query among all configurations that were tried on it.

    Args:
        run: The run.
        queries: The test queries.
        samples: What the other rows under the same adapters said.
    """
    sizes = sizes_of(run, "oracle")
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


def _choice_rows(
    run: Run,
    name: str,
    sizes: Sequence[int],
    config: Mapping[str, Any],
    fit: Callable[[Array, Array, Sequence[Sequence[int]]], LinearChoice],
) -> Iterator[Row]:
    """The rows of a baseline that learns to choose from the library."""
    table = library_losses(run)
    for size in sizes:

        def build(folder: Path, size: int = size) -> dict[str, Any]:
            queries = library_queries(run)
            sets = json.loads((table.folder / "sets.json").read_text(encoding="utf-8"))
            columns = [column for column, layers in enumerate(sets) if len(layers) == size]
            losses = read_losses(table.folder)
            loss_QS = np.array([losses[query.id] for query in queries])[:, columns]
            choice = fit(embeddings(run, queries), loss_QS, [sets[column] for column in columns])
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


def _by_embedding(run: Run, choice: LinearChoice) -> Chooser:
    # Loaded here, not while the first query is timed.
    encoder_of(run)
    return lambda query: choice(embeddings(run, [query])[0])


def _looked_up(layers_of: Mapping[str, tuple[int, ...]]) -> Chooser:
    return lambda query: layers_of[query.id]


def _fixed(curve: str, budget: str, layers: Sequence[int]) -> Row:
    return Row(f"{curve}-{budget}", lambda query: layers, str(list(layers)), curve=curve)


def _set_rows(name: str, artifact: Artifact, sizes: Sequence[int]) -> Iterator[Row]:
    sets = json.loads((artifact.folder / "sets.json").read_text(encoding="utf-8"))
    for size in sizes:
        yield _fixed(name, str(size), sets[str(size)]["layers"])
