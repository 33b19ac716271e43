"""The stage ``explore``: tries configurations on queries and keeps every rollout."""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import OmegaConf

from dynprune.artifacts import Artifact
from dynprune.atomic import replacing
from dynprune.data.rollouts import Journal, RolloutWriter, Tried, read_likelihoods, read_rollouts
from dynprune.data.tasks import Query
from dynprune.exploration.engine import Step
from dynprune.exploration.engine import explore as explore_queries
from dynprune.exploration.statistics import exploration_statistics, statistics_lines
from dynprune.metrics.certainty import LOST
from dynprune.metrics.scores import get_score, perfect_score
from dynprune.stages.adapters import adapters, pruner_of, upstream_of
from dynprune.stages.processes import check_job, shared_out
from dynprune.stages.progress import track
from dynprune.stages.run import Run, digest, once_a_run, plain

log = logging.getLogger(__name__)
VERSION = 3
STATISTICS = "statistics.json"
_QUERIES_A_PROCESS = 50
# Which key says how many queries of a split there are.
_LIMITS = {
    "train": "exploration.max_queries",
    "validation": "exploration.max_validation_queries",
    "test": "evaluation.max_queries",
}


@once_a_run
def explore(run: Run, split: str = "train") -> Artifact:
    """Makes the rollouts of one split: parquet shards, each with all rollouts of some queries, and their statistics.

    Args:
        run: The run.
        split: ``train``, ``validation`` for choosing checkpoints, or ``test`` for the oracle.
    """
    settings = run.config.exploration
    key = _LIMITS[split]
    queries = run.queries(split, OmegaConf.select(run.config, key), key)
    # A wrong name is refused before adapters are made.
    get_score(settings.score, "exploration.score")
    # So are wrong settings, and not by each process.
    instantiate(settings.strategy)
    check_job(run)
    adapters_artifact = adapters(run)
    config = {
        "model": run.model_identity,
        "strategy": plain(settings.strategy),
        "score": settings.score,
        "max_tokens_margin": settings.max_tokens_margin,
        "estimate_all": settings.estimate_all,
        "seed": run.config.seed,
    }
    upstream = upstream_of(adapters_artifact)

    def build(folder: Path) -> dict[str, Any]:
        writer = RolloutWriter(folder, num_layers=run.slm.num_layers, score=settings.score)
        # A copy: the writer adds to its own.
        done = set(writer.completed_ids)
        left = [query for query in queries if query.id not in done]
        journal = Journal(folder, done)
        # What is trained on them reads the rollouts in this order, whichever query ends first.
        place_of = {query.id: place for place, query in enumerate(queries)}
        job = partial(_explored, adapters_artifact, journal.found)
        with closing(shared_out(run, job, left, _QUERIES_A_PROCESS)) as steps:
            for rollouts in track(_ended(steps, journal), f"exploring {split} queries", len(left)):
                writer.append(rollouts, place_of[rollouts[0].id])
        journal.remove()
        _write_statistics(folder, perfect_score(settings.score))
        return {"queries": len(queries), "resumed_queries": len(done), "resumed_in_flight": len(journal.found)}

    return run.store.get_or_build("explore", VERSION, config, digest(queries), upstream, build, resumable=True)


def _write_statistics(folder: Path, min_score: float) -> None:
    """Writes what was tried beside the shards, and logs it."""
    statistics = exploration_statistics(read_rollouts(folder), read_likelihoods(folder), min_score)
    with replacing(folder / STATISTICS) as temporary:
        temporary.write_text(json.dumps(asdict(statistics), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    log.info("explored %s", "\n".join(statistics_lines(statistics)))


def _ended(steps: Iterable[Step], journal: Journal) -> Iterator[list[Tried]]:
    """What each search found, when it ends; what came before stands in the journal."""
    for step in steps:
        if step.new:
            journal.append(step.new)
        if step.ended is not None:
            yield step.ended


def _explored(
    artifact: Artifact | None, earlier: Sequence[Tried], run: Run, queries: Sequence[Query], shared_bytes: int
) -> Iterator[Step]:
    settings = run.config.exploration
    with pruner_of(run, artifact) as pruner:
        yield from explore_queries(
            run.slm,
            pruner,
            queries,
            instantiate(settings.strategy),
            get_score(settings.score, "exploration.score"),
            LOST.get(settings.score),
            settings.max_tokens_margin,
            run.config.hardware.batch_size,
            shared_bytes,
            run.config.seed,
            settings.estimate_all,
            earlier,
        )
