"""The stage ``pairs``: turns the rollouts of each query into preference pairs."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from dynprune.artifacts import Artifact
from dynprune.data.pairs import write_pairs
from dynprune.stages.explore import explore
from dynprune.stages.run import Run, once_a_run, plain

VERSION = 2
PAIRS = "pairs.parquet"


@once_a_run
def pairs(run: Run, split: str = "train") -> Artifact:
    """Makes the preference pairs of one split.

    Args:
        run: The run.
        split: ``train``, or ``validation`` for choosing checkpoints.
    """
    settings = run.config.pairs
    rollouts = explore(run, split)

    def build(folder: Path) -> dict[str, Any]:
        counts = write_pairs(
            rollouts.folder,
            folder / PAIRS,
            settings.strategy,
            settings.count,
            run.config.seed,
            settings.min_winner_score,
            settings.prefer_by,
            settings.margin,
            settings.equal_sizes,
        )
        return asdict(counts)

    return run.store.get_or_build(
        "pairs",
        VERSION,
        {"pairs": plain(settings), "seed": run.config.seed},
        {},
        {"explore": rollouts.fingerprint},
        build,
        resumable=False,
    )
