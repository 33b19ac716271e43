"""What the parts of a run came to: its adapters, its exploration, and its router where that was trained alone.

Each is a note in the run's folder, from which a comparison of runs reads it. Those of several seeds are averaged, figure by
figure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np


@dataclass(frozen=True)
class AdapterPart:
    """How far the adapters are from their layers, on held-out states.

    Attributes:
        mse: Of each layer, the mean squared error.
        relative_error: Of each layer, the squared error as a share of what the layer changes.
    """

    mse: tuple[float, ...]
    relative_error: tuple[float, ...]


@dataclass(frozen=True)
class ExplorationPart:
    """What the exploration of the train split tried.

    Attributes:
        queries: Queries explored.
        rollouts: Configurations generated, over all queries.
        distinct_configurations: Different ones among them and those that were estimated.
        success: Share of the generated ones with pruned layers that succeeded.
        pruned_layers: Mean number of layers that these prune.
        pruned_layers_deviation: Standard deviation of that number.
        score_variance: Variance of the scores of a query's rollouts, mean over queries.
        deepest_success: Most layers pruned with success, mean over the queries that have a success.
    """

    queries: float
    rollouts: float
    distinct_configurations: float
    success: float
    pruned_layers: float
    pruned_layers_deviation: float
    score_variance: float
    deepest_success: float


@dataclass(frozen=True)
class RouterPart:
    """What the training of a router came to.

    Attributes:
        validation_loss: The least loss on held-out data; losses of different methods do not compare.
        preference_accuracy: Share of held-out pairs in the right order, with that checkpoint.
        best_epoch: The epoch of that checkpoint.
    """

    validation_loss: float
    preference_accuracy: float
    best_epoch: float


Part = AdapterPart | ExplorationPart | RouterPart
PARTS: Mapping[str, type[AdapterPart] | type[ExplorationPart] | type[RouterPart]] = {
    "adapters": AdapterPart,
    "exploration": ExplorationPart,
    "router": RouterPart,
}
"""By its name in notes."""
P = TypeVar("P", AdapterPart, ExplorationPart, RouterPart)


@dataclass(frozen=True)
class PartEntry(Generic[P]):
    """One part under one setting.

    Attributes:
        setting: What was typed for its runs and differs from others.
        seeds: Number of runs.
        mean: The part's figures, averaged over them.
        spread: Their standard deviations (n - 1); ``None`` for a single run.
        runs: The runs' folders.
    """

    setting: str
    seeds: int
    mean: P
    spread: P | None
    runs: tuple[Path, ...]


def read_part(name: str, found: Mapping[str, Any]) -> Part:
    """A part from its note.

    Raises:
        KeyError: The note lacks a figure, or there is no such part.
    """
    kind: Any = PARTS[name]
    figures = [found[field.name] for field in fields(kind)]
    part: Part = kind(*(tuple(figure) if isinstance(figure, list) else figure for figure in figures))
    return part


def part_entries(found: Sequence[tuple[str, Path, P]]) -> list[PartEntry[P]]:
    """Averages a part over the runs of each setting.

    Args:
        found: Setting, folder and part of each run.
    """
    members: dict[str, list[tuple[Path, P]]] = {}
    for setting, folder, part in found:
        members.setdefault(setting, []).append((folder, part))
    entries = []
    for setting, runs in members.items():
        of_seeds = [part for _, part in runs]
        spread = _over_seeds(of_seeds, 1) if len(of_seeds) > 1 else None
        entries.append(PartEntry(setting, len(runs), _over_seeds(of_seeds, None), spread, tuple(folder for folder, _ in runs)))
    return entries


def _over_seeds(of_seeds: Sequence[P], deviation: int | None) -> P:
    """Mean of each figure, or its standard deviation with so many degrees of freedom taken off."""

    def figure(name: str) -> Any:
        value_S = np.array([getattr(part, name) for part in of_seeds], dtype=float)
        found = value_S.mean(axis=0) if deviation is None else value_S.std(axis=0, ddof=deviation)
        return tuple(found.tolist()) if found.ndim else float(found)

    return replace(of_seeds[0], **{field.name: figure(field.name) for field in fields(of_seeds[0])})
