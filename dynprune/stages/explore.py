"""The stage ``explore``: tries configurations on queries and keeps every rollout."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import OmegaConf

from dynprune.artifacts import Artifact
from dynprune.atomic import replacing
from dynprune.data.rollouts import (
    Journal,
    RolloutWriter,
    Tried,
    by_query,
    completed_ids,
    copy_shards,
    read_header,
    read_likelihoods,
    read_rollouts,
)
from dynprune.data.tasks import Query
from dynprune.evaluation.parts import ExplorationPart
from dynprune.exploration.engine import Step
from dynprune.exploration.engine import explore as explore_queries
from dynprune.exploration.statistics import ExplorationStatistics, exploration_statistics, statistics_lines
from dynprune.metrics.certainty import LOST
from dynprune.metrics.scores import get_score, perfect_score
from dynprune.stages.adapters import adapters, pruner_of, upstream_of
from dynprune.stages.part_report import report_parts
from dynprune.stages.processes import check_job, shared_out
from dynprune.stages.progress import track
from dynprune.stages.run import Run, content_digest, digest, once_a_run, plain

log = logging.getLogger(__name__)
VERSION = 3
STATISTICS = "statistics.json"
_SHARD = "explore_shard"
_QUERIES_A_PROCESS = 50
# Which key says how many queries of a split there are.
_LIMITS = {
    "train": "exploration.max_queries",
    "validation": "exploration.max_validation_queries",
    "test": "evaluation.max_queries",
}


def explore_splits(run: Run) -> None:
    """Makes the rollouts of the train and of the validation split, or those of one shard of each.

    Raises:
        ValueError: There is no such shard.
    """
    settings = run.config.exploration
    if settings.shard is not None and not 0 <= settings.shard < settings.shards:
        raise ValueError(
            f"exploration.shard={settings.shard} is no shard of exploration.shards={settings.shards}; allowed: 0 to "
            f"{settings.shards - 1}, or null, which merges them"
        )
    splits = ("train", "validation")
    if settings.shard is None:
        train, _ = (explore(run, split) for split in splits)
        report_parts(run, {"exploration": exploration_part(run, train)})
        return
    shards = {split: _queries(run, split)[settings.shard :: settings.shards] for split in splits}
    # Before the first of them is explored: other shards than these would be of no use to it.
    for split, queries in shards.items():
        if not queries:
            raise ValueError(
                f"exploration.shard={settings.shard} has no {split} query; lower exploration.shards={settings.shards}, or "
                f"raise {_LIMITS[split]}"
            )
    for split, queries in shards.items():
        build = _exploring(run, split, queries)
        run.store.get_or_build(_SHARD, VERSION, *_identity(run, queries), build, resumable=True)
    report_parts(run, {})


def exploration_part(run: Run, artifact: Artifact) -> ExplorationPart:
    """What an exploration tried, and what came of it."""
    found = _statistics(artifact.folder, perfect_score(run.config.exploration.score))
    own = {field.name: getattr(found, field.name) for field in fields(ExplorationPart) if field.name != "rollouts"}
    return ExplorationPart(**own, rollouts=found.generated)


@once_a_run
def explore(run: Run, split: str = "train") -> Artifact:
    """Makes the rollouts of one split: parquet shards, each with all rollouts of some queries, and their statistics.

    With ``exploration.shards`` above 1 they are not made here but merged from what other jobs made; the artifact is the same.

    Args:
        run: The run.
        split: ``train``, ``validation`` for choosing checkpoints, or ``test`` for the oracle.

    Raises:
        ValueError: A shard is missing, or the run is to make one shard alone and needs all of them.
    """
    settings = run.config.exploration
    if settings.shard is not None:
        raise ValueError(
            f"exploration.shard={settings.shard} makes a part of the rollouts, and stage={run.config.stage} needs all of them; "
            "allowed: stage=explore with it, or exploration.shard=null"
        )
    queries = _queries(run, split)
    if settings.folder is not None and split != "test":
        return _taken(run, split, queries)
    # What the shards of the oracle's rollouts would be is nobody's concern: the rows of the table tell the oracle more.
    merged = settings.shards > 1 and split != "test"
    build = _merging(run, split, queries) if merged else _exploring(run, split, queries)
    return run.store.get_or_build("explore", VERSION, *_identity(run, queries), build, resumable=True)


def _taken(run: Run, split: str, queries: Sequence[Query]) -> Artifact:
    """The rollouts of the split's queries in a folder, for example of ``stage=import``, instead of exploring.

    Raises:
        ValueError: The folder is about another number of layers or another score, or has none of the queries.
    """
    settings = run.config.exploration
    source = Path(settings.folder)
    wanted = {query.id: place for place, query in enumerate(queries)}

    def build(folder: Path) -> dict[str, Any]:
        header = read_header(source)
        if (header.num_layers, header.score) != (run.slm.num_layers, settings.score):
            raise ValueError(
                f"exploration.folder={source} has rollouts of {header.num_layers} layers scored by {header.score}; allowed: "
                f"those of {run.slm.num_layers} layers, as {run.slm.name} has, with exploration.score={header.score}"
            )
        writer = RolloutWriter(folder, header.num_layers, header.score)
        for rollouts in by_query(read_rollouts(source)):
            if rollouts[0].id in wanted:
                writer.append(rollouts, wanted[rollouts[0].id])
        if not writer.completed_ids:
            raise ValueError(
                f"exploration.folder={source} has no rollout of the {len(queries)} queries of the {split} split; allowed: "
                "rollouts of the run's own data, with its ids"
            )
        _write_statistics(folder, perfect_score(settings.score))
        return {"queries": len(writer.completed_ids)}

    config = {"rollouts": content_digest(settings.folder, ("rollouts-*.parquet",)), "score": settings.score}
    return run.store.get_or_build("explore", VERSION, config, digest(queries), {}, build, resumable=False)


def _queries(run: Run, split: str) -> list[Query]:
    key = _LIMITS[split]
    return run.queries(split, OmegaConf.select(run.config, key), key)


def _identity(run: Run, queries: Sequence[Query]) -> tuple[dict[str, Any], Mapping[str, Any], dict[str, str]]:
    """Configuration, data and upstream of the rollouts of some queries."""
    settings = run.config.exploration
    # A wrong name is refused before adapters are made.
    get_score(settings.score, "exploration.score")
    # So are wrong settings, and not by each process.
    instantiate(settings.strategy)
    check_job(run)
    config = {
        "model": run.model_identity,
        "strategy": plain(settings.strategy),
        "score": settings.score,
        "max_tokens_margin": settings.max_tokens_margin,
        "estimate_all": settings.estimate_all,
        "seed": settings.seed,
    }
    return config, digest(queries), upstream_of(adapters(run))


def _exploring(run: Run, split: str, queries: Sequence[Query]) -> Callable[[Path], dict[str, Any]]:
    settings = run.config.exploration

    def build(folder: Path) -> dict[str, Any]:
        writer = RolloutWriter(folder, num_layers=run.slm.num_layers, score=settings.score)
        # A copy: the writer adds to its own.
        done = set(writer.completed_ids)
        left = [query for query in queries if query.id not in done]
        journal = Journal(folder, done)
        # What is trained on them reads the rollouts in this order, whichever query ends first.
        place_of = {query.id: place for place, query in enumerate(queries)}
        job = partial(_explored, adapters(run), journal.found)
        with closing(shared_out(run, job, left, _QUERIES_A_PROCESS)) as steps:
            for rollouts in track(_ended(steps, journal), f"exploring {split} queries", len(left)):
                writer.append(rollouts, place_of[rollouts[0].id])
        journal.remove()
        _write_statistics(folder, perfect_score(settings.score))
        return {"queries": len(queries), "resumed_queries": len(done), "resumed_in_flight": len(journal.found)}

    return build


def _merging(run: Run, split: str, queries: Sequence[Query]) -> Callable[[Path], dict[str, Any]]:
    number = run.config.exploration.shards

    def build(folder: Path) -> dict[str, Any]:
        found = [run.store.find(_SHARD, VERSION, *_identity(run, queries[shard::number])) for shard in range(number)]
        if missing := ",".join(str(shard) for shard, artifact in enumerate(found) if artifact is None):
            raise ValueError(
                f"exploration.shards={number}: of the {split} split the shards {missing} are missing; type dynprune -m "
                f"stage=explore exploration.shards={number} exploration.shard={missing}, with the other keys as they are"
            )
        for shard, artifact in enumerate(found):
            assert artifact is not None
            copy_shards(artifact.folder, folder, range(shard, len(queries), number))
        # A query in two shards is refused here.
        merged, wanted = completed_ids(folder), {query.id for query in queries}
        if merged != wanted:
            raise ValueError(
                f"the {number} shards of the {split} split lack {len(wanted - merged)} queries and have "
                f"{len(merged - wanted)} others; remove {run.store.root / _SHARD} and explore them again"
            )
        _write_statistics(folder, perfect_score(run.config.exploration.score))
        return {"queries": len(queries), "shards": number}

    return build


def _write_statistics(folder: Path, min_score: float) -> None:
    """Writes what was tried beside the shards, and logs it."""
    statistics = _statistics(folder, min_score)
    with replacing(folder / STATISTICS) as temporary:
        temporary.write_text(json.dumps(asdict(statistics), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    log.info("explored %s", "\n".join(statistics_lines(statistics)))


def _statistics(folder: Path, min_score: float) -> ExplorationStatistics:
    return exploration_statistics(read_rollouts(folder), read_likelihoods(folder), min_score)


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
            settings.seed,
            settings.estimate_all,
            earlier,
        )
