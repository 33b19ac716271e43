"""The headline figures of ``experiment=main``, and the file ``figures.json`` that keeps them."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dynprune.atomic import replacing
from dynprune.evaluation.curves import BudgetCurve, at_speed, compare_at_speed, covers, gap_closed
from dynprune.evaluation.statistics import Interval

LOW_SPEEDUP, HIGH_SPEEDUP = 0.10, 0.18
"""Nominal speedups of the headline: the mild one, and the thesis's (61% of 71% kept at 18%)."""


@dataclass(frozen=True)
class Headline:
    """What is claimed; ``None`` for what was not measured or is not defined.

    Accuracy is AST match throughout. "At 18%" is a nominal speedup of 0.18 of the router, between budgets by
    interpolation.

    Attributes:
        accuracy_kept_at_10: The best router's accuracy at 10% as a share of the unpruned SLM's.
        accuracy_kept_at_18: The same at 18%.
        router_minus_static: The best router minus the best static sets, at the mean pruned layers that the router has at
            18%.
        preference_minus_fbc: The best preference method's router minus FBC's, both at 18%.
        gap_closed: Share of the gap between static and oracle that the best router closes, at the same pruned layers.
        measured_over_nominal: The best router's measured speedup over its nominal one, at 18%.
        preference_accuracy: Share of preference pairs of validation queries that the router ranks rightly; the checkpoint was
            chosen on them.
        context_aware_gain: Accuracy with the run's adapters minus that with other ones, each under its own searched static set.
        lossless_speedup: Time of the unpruned SLM over time of the lossless mode, same outputs.
        n_test: Number of test queries.
        seeds: Number of router seeds.
    """

    accuracy_kept_at_10: float | None
    accuracy_kept_at_18: float | None
    router_minus_static: Interval | None
    preference_minus_fbc: Interval | None
    gap_closed: float | None
    measured_over_nominal: float | None
    preference_accuracy: float | None
    context_aware_gain: float | None
    lossless_speedup: float | None
    n_test: int
    seeds: int

    def __post_init__(self) -> None:
        """Checks the figures.

        Raises:
            ValueError: A figure is NaN or infinite.
        """
        for name, value in asdict(self).items():
            numbers = value.values() if isinstance(value, dict) else [value]
            if not all(number is None or math.isfinite(number) for number in numbers):
                raise ValueError(f"The headline's {name} is {value}; give a finite number, or None if it was not measured.")


def headline(
    full_N: npt.ArrayLike,
    router: BudgetCurve,
    static: BudgetCurve,
    oracle: BudgetCurve,
    preference: BudgetCurve,
    fbc: BudgetCurve,
    seeds: int,
    preference_accuracy: float | None = None,
    context_aware_gain: float | None = None,
    lossless_speedup: float | None = None,
) -> Headline:
    """Computes what follows from the budget curves; which router is best was decided on validation.

    Args:
        full_N: For each test query 1 if the unpruned SLM is right, else 0.
        router: The best router, averaged over its seeds.
        static: The best static sets.
        oracle: The best configuration tried for each query.
        preference: The best router of a preference method, averaged over its seeds.
        fbc: FBC's router, averaged over its seeds.
        seeds: Number of router seeds behind the averages.
        preference_accuracy: See `Headline`; measured elsewhere, as are the next two.
        context_aware_gain: See `Headline`.
        lossless_speedup: See `Headline`.

    Returns:
        The figures. One is ``None`` where a curve that it needs does not reach so far or was not timed.

    Raises:
        ValueError: The numbers of queries differ.
    """
    full_N = np.asarray(full_N, dtype=np.float64)
    _check_queries(full_N.size, (router, static, oracle, preference, fbc))
    point = at_speed(router, HIGH_SPEEDUP) if covers(router, HIGH_SPEEDUP) else None
    minus_static = share = None
    if point and covers(static, point.mean_pruned_layers, "mean_pruned_layers"):
        minus_static = compare_at_speed(router, static, point.mean_pruned_layers, "mean_pruned_layers").difference
        if covers(oracle, point.mean_pruned_layers, "mean_pruned_layers"):
            share = gap_closed(router, static, oracle, point.mean_pruned_layers, "mean_pruned_layers")
    minus_fbc = None
    if covers(preference, HIGH_SPEEDUP) and covers(fbc, HIGH_SPEEDUP):
        minus_fbc = compare_at_speed(preference, fbc, HIGH_SPEEDUP).difference
    return Headline(
        accuracy_kept_at_10=_accuracy_kept(full_N, router, LOW_SPEEDUP),
        accuracy_kept_at_18=_accuracy_kept(full_N, router, HIGH_SPEEDUP),
        router_minus_static=minus_static,
        preference_minus_fbc=minus_fbc,
        gap_closed=share.mean if share else None,
        measured_over_nominal=point.measured_speedup / HIGH_SPEEDUP if point and point.measured_speedup is not None else None,
        preference_accuracy=preference_accuracy,
        context_aware_gain=context_aware_gain,
        lossless_speedup=lossless_speedup,
        n_test=full_N.size,
        seeds=seeds,
    )


def write_headline(figures: Headline, path: Path) -> None:
    """Writes the figures as JSON, complete or not at all; ``null`` for what is ``None``."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(asdict(figures), indent=2) + "\n", encoding="utf-8")


def _check_queries(n: int, curves: Sequence[BudgetCurve]) -> None:
    for curve in curves:
        if (other := len(curve.points[0].correct_N)) != n:
            raise ValueError(
                f"The headline needs the same queries for all, but the unpruned SLM has {n} and {curve.name} {other}."
            )


def _accuracy_kept(full_N: npt.NDArray[np.float64], router: BudgetCurve, speedup: float) -> float | None:
    if not covers(router, speedup) or not full_N.any():
        return None
    return float(at_speed(router, speedup).correct_N.mean() / full_N.mean())
