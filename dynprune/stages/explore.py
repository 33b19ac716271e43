"""The stage ``explore``: tries configurations on queries and keeps every rollout."""

import json
import logging
import traceback
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import asdict
from multiprocessing import get_context, parent_process
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Empty
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from dynprune.artifacts import Artifact
from dynprune.atomic import replacing
from dynprune.data.rollouts import RolloutWriter, Tried, read_likelihoods, read_rollouts
from dynprune.data.tasks import Query
from dynprune.exploration.engine import explore as explore_queries
from dynprune.exploration.statistics import exploration_statistics, statistics_lines
from dynprune.metrics.certainty import LOST
from dynprune.metrics.scores import get_score, perfect_score
from dynprune.stages.adapters import adapters, pruner_of, upstream_of
from dynprune.stages.progress import track
from dynprune.stages.run import Run, digest, once_a_run, plain, portable_config

log = logging.getLogger(__name__)
VERSION = 3
STATISTICS = "statistics.json"
# A process takes some 20 s to start, in which so many queries could have been explored.
_LEAST_QUERIES = 50
_SECONDS_BETWEEN_LOOKS = 2.0
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
        processes = min(run.config.hardware.explore_processes, len(left) // _LEAST_QUERIES)
        searches = (
            _explored(run, adapters_artifact, left, run.shared_bytes)
            if processes < 2
            else _explored_in_processes(run, adapters_artifact, left, processes)
        )
        # What is trained on them reads the rollouts in this order, whichever query ends first.
        place_of = {query.id: place for place, query in enumerate(queries)}
        with closing(searches):
            for rollouts in track(searches, f"exploring {split} queries", len(left)):
                writer.append(rollouts, place_of[rollouts[0].id])
        _write_statistics(folder, perfect_score(settings.score))
        return {"queries": len(queries), "resumed_queries": len(done)}

    return run.store.get_or_build("explore", VERSION, config, digest(queries), upstream, build, resumable=True)


def _write_statistics(folder: Path, min_score: float) -> None:
    """Writes what was tried beside the shards, and logs it."""
    statistics = exploration_statistics(read_rollouts(folder), read_likelihoods(folder), min_score)
    with replacing(folder / STATISTICS) as temporary:
        temporary.write_text(json.dumps(asdict(statistics), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    log.info("explored %s", "\n".join(statistics_lines(statistics)))


def _explored(
    run: Run, artifact: Artifact | None, queries: Sequence[Query], shared_bytes: int
) -> Generator[list[Tried], None, None]:
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
        )


def _explored_in_processes(
    run: Run, artifact: Artifact | None, queries: Sequence[Query], processes: int
) -> Generator[list[Tried], None, None]:
    """Shares queries, threads and memory out to processes, each with an SLM of its own.

    Raises:
        RuntimeError: If one of the processes fails or dies.
    """
    # What is wrong with the strategy's settings is said here, not by each process.
    instantiate(run.config.exploration.strategy)
    context = get_context("spawn")
    results: Queue[tuple[int, list[Tried] | str | None]] = context.Queue()
    threads = max(1, torch.get_num_threads() // processes)
    shared_bytes = run.shared_bytes // processes
    workers = {
        number: context.Process(
            target=_work,
            args=(portable_config(run), artifact, queries[number::processes], shared_bytes, threads, number, results),
            daemon=True,
        )
        for number in range(processes)
    }
    log.info("exploring in %d processes, %d threads each", processes, threads)
    try:
        for worker in workers.values():
            worker.start()
        working = set(workers)
        while working:
            # Looked at before the queue is: what a process sent before it ended is in the queue then.
            ended = [number for number in working if not workers[number].is_alive()]
            try:
                number, result = results.get(timeout=_SECONDS_BETWEEN_LOOKS)
            except Empty:
                if ended:
                    raise RuntimeError(
                        f"a process that explored ended with exit code {workers[ended[0]].exitcode}, for lack of memory "
                        "perhaps; what is done is kept: type the same command again, with hardware.explore_processes=1"
                    ) from None
                continue
            if isinstance(result, str):
                raise RuntimeError(f"a process that explored failed:\n{result}")
            if result is None:
                working.remove(number)
            else:
                yield result
    finally:
        for worker in workers.values():
            if worker.is_alive():
                worker.terminate()
                worker.join()


def _work(
    config: DictConfig,
    artifact: Artifact | None,
    queries: Sequence[Query],
    shared_bytes: int,
    threads: int,
    number: int,
    results: "Queue[tuple[int, list[Tried] | str | None]]",
) -> None:
    """What one of several processes does: explores its share and sends the rollouts of each query."""
    torch.set_num_threads(threads)
    parent = parent_process()
    assert parent is not None
    try:
        for rollouts in _explored(Run(config), artifact, queries, shared_bytes):
            if not parent.is_alive():
                return
            results.put((number, rollouts))
        results.put((number, None))
    except Exception:
        # Not the exception itself: not every one survives the way to another process.
        results.put((number, traceback.format_exc()))
