"""One line of the benchmarks: two sides, timed in turns in one run."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dynprune.adapters.stack import AdapterStack
from dynprune.evaluation.latency import now
from dynprune.stages.run import Run

PRUNED = (3, 7, 12, 18, 22, 26)
"""Six layers of the embedded SLM's 30."""


@dataclass(frozen=True)
class Line:
    """One comparison.

    Attributes:
        name: What is compared.
        ratio: The figure that the target is about.
        target: What it should reach.
        this: Median of this side.
        against: Median of the other side.
        unit: Unit of both medians.
    """

    name: str
    ratio: float
    target: str
    this: float
    against: float
    unit: str


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """The time that some work on a device takes."""
    start = now(device)
    work()
    return now(device) - start


def in_turns(rounds: int, device: torch.device, *sides: Callable[[], object]) -> list[float]:
    """Median seconds of each side, run in turns.

    Args:
        rounds: How often each side runs and is timed, after one run that does not count.
        device: Where both work.
        sides: The work of each side.
    """
    for side in sides:
        side()
    taken = [[seconds(side, device) for side in sides] for _ in range(rounds)]
    return [statistics.median(of_side) for of_side in zip(*taken, strict=True)]


def untrained_stack(run: Run) -> AdapterStack:
    """Adapters that change nothing yet; they cost what trained ones do."""
    stack = AdapterStack(run.slm.num_layers, run.slm.hidden_size, run.config.adapter.bottleneck)
    return stack.to(device=run.slm.device, dtype=run.slm.model.dtype).requires_grad_(False)
