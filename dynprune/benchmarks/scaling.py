"""How the cost of exploration grows with queries, configurations, the length of prompts, and layers."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dynprune.adapters.stack import AdapterStack
from dynprune.atomic import replacing
from dynprune.benchmarks.exploration import Task, swap_and_generate
from dynprune.data.tasks import Query
from dynprune.slm.loading import load_tiny
from dynprune.stages.progress import track

_SAMPLED = 3


@dataclass(frozen=True)
class Size:
    """How much is explored.

    Attributes:
        queries: Number of queries.
        configurations: Configurations tried on each.
        characters: Characters of the user's words, which are the prompt's tokens but for some of the chat template.
        layers: Decoder layers of the SLM.
    """

    queries: int = 8
    configurations: int = 6
    characters: int = 256
    layers: int = 12


@dataclass(frozen=True)
class Cost:
    """Seconds a rollout takes in the search, and with swapped modules, one query at a time."""

    search: float
    swapped: float


_AXES: Mapping[str, tuple[int, ...]] = {
    "queries": (2, 4, 8, 16),
    "configurations": (3, 6, 12),
    "characters": (128, 256, 512, 1024),
    "layers": (6, 12, 24),
}
_LABELS = {
    "queries": "queries",
    "configurations": "configurations a query",
    "characters": "prompt, tokens",
    "layers": "layers",
}


def measure_scaling(batch_size: int, shared_bytes: int) -> dict[str, list[tuple[int, Cost]]]:
    """Measures the cost of a rollout on a random SLM 256 wide, with one size changed at a time.

    Args:
        batch_size: Rows generated together.
        shared_bytes: Memory for what configurations share.

    Returns:
        For each field of `Size` its values with the cost at each.
    """
    sizes = [(axis, value) for axis, values in _AXES.items() for value in values]
    costs: dict[str, list[tuple[int, Cost]]] = {axis: [] for axis in _AXES}
    for axis, value in track(sizes, "scaling", len(sizes)):
        costs[axis].append((value, _cost(replace(Size(), **{axis: value}), batch_size, shared_bytes)))
    return costs


def _cost(size: Size, batch_size: int, shared_bytes: int) -> Cost:
    slm = load_tiny("llama", num_layers=size.layers, hidden_size=256, seed=0)
    stack = AdapterStack(size.layers, 256, 64).requires_grad_(False)
    # No output is cut: random weights talk nonsense, which is certain to be wrong at once.
    task = Task(slm, stack, None, 1.0, batch_size, shared_bytes)
    queries = [_query(number, size.characters) for number in range(size.queries)]
    start = time.perf_counter()
    rollouts = task.explored(queries, size.configurations)
    search = (time.perf_counter() - start) / len(rollouts)
    by_id = {query.id: query for query in queries}
    chosen = rollouts[:: max(1, len(rollouts) // _SAMPLED)][:_SAMPLED]
    start = time.perf_counter()
    for rollout in chosen:
        query = by_id[rollout.id]
        swap_and_generate(slm, stack, [query], rollout.pruned_layers, [task.limit(query)])
    return Cost(search, (time.perf_counter() - start) / len(chosen))


def _query(number: int, characters: int) -> Query:
    answer = {"name": "f", "arguments": {"text": "x" * 8}}
    return Query(
        id=f"q{number}",
        category="simple",
        messages=({"role": "user", "content": f"{number:04d}" * (characters // 4)},),
        tools=(),
        answers=(answer,),
        allowed=(),
    )


def plot_scaling(costs: Mapping[str, list[tuple[int, Cost]]], path: Path) -> None:
    """Draws a panel for each size, both axes logarithmic.

    Args:
        costs: As `measure_scaling` gives them.
        path: The picture, PNG.
    """
    figure = Figure(figsize=(8, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    for ax, (axis, points) in zip(np.ravel(figure.subplots(2, 2, sharey=True)), costs.items(), strict=True):
        values = [value for value, _ in points]
        ax.loglog(
            values, [1000 * cost.swapped for _, cost in points], "s--", color="#6b6b6b", label="modules swapped, one at a time"
        )
        ax.loglog(values, [1000 * cost.search for _, cost in points], "o-", color="#D55E00", label="dynprune")
        ax.set_xticks(values, [str(value) for value in values])
        ax.minorticks_off()
        ax.set_xlabel(_LABELS[axis])
        ax.grid(alpha=0.3)
    for ax in figure.axes[::2]:
        ax.set_ylabel("ms a rollout")
    figure.axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle("What a rollout costs as the work grows (random SLM, 256 wide)", fontsize=11)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=160)
