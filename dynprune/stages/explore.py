"""The stage ``explore``: tries configurations on queries and keeps every rollout."""

from pathlib import Path
from typing import Any

from hydra.utils import instantiate

from dynprune.artifacts import Artifact
from dynprune.data.rollouts import RolloutWriter
from dynprune.exploration.engine import explore as explore_queries
from dynprune.metrics.certainty import LOST
from dynprune.metrics.scores import get_score
from dynprune.stages.adapters import adapters, pruner_of
from dynprune.stages.progress import track
from dynprune.stages.run import Run, digest, once_a_run, plain

VERSION = 2


@once_a_run
def explore(run: Run, split: str = "train") -> Artifact:
    """Makes the rollouts of one split: parquet shards, each with all rollouts of some queries.

    Args:
        run: The run.
        split: ``train``, or ``validation`` for choosing checkpoints.
    """
    settings = run.config.exploration
    key = "max_queries" if split == "train" else "max_validation_queries"
    queries = run.queries(split, settings[key], f"exploration.{key}")
    score = get_score(settings.score)
    adapters_artifact = adapters(run)
    config = {
        "model": run.model_identity,
        "strategy": plain(settings.strategy),
        "score": settings.score,
        "max_tokens_margin": settings.max_tokens_margin,
        "seed": run.config.seed,
    }
    upstream = {"adapters": adapters_artifact.fingerprint if adapters_artifact else "none"}

    def build(folder: Path) -> dict[str, Any]:
        writer = RolloutWriter(folder, num_layers=run.slm.num_layers, score=settings.score)
        done = writer.completed_ids
        left = [query for query in queries if query.id not in done]
        counts = {"queries": len(queries), "resumed_queries": len(done)}
        with pruner_of(run, adapters_artifact) as pruner:
            searches = explore_queries(
                run.slm,
                pruner,
                left,
                instantiate(settings.strategy),
                score,
                LOST.get(settings.score),
                settings.max_tokens_margin,
                run.config.hardware.batch_size,
                int(run.config.hardware.shared_gib * 2**30),
                run.config.seed,
            )
            for rollouts in track(searches, f"exploring {split} queries", len(left)):
                writer.append(rollouts)
        return counts

    return run.store.get_or_build("explore", VERSION, config, digest(queries), upstream, build, resumable=True)
