"""Budget curves: a method's accuracy at each of its budgets, and methods compared at equal speed.

Axis suffixes: P = points of a curve, N = queries.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from dynprune.evaluation.comparisons import PairedDifference, paired_difference
from dynprune.evaluation.statistics import Interval, ratio_interval

Axis = Literal["mean_pruned_layers", "nominal_speedup", "measured_speedup"]
"""What "equal speed" means: layers pruned per query, or one of the two speedups as shares."""

_ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class BudgetPoint:
    """A method at one budget.

    Attributes:
        mean_pruned_layers: Pruned layers, averaged over queries.
        nominal_speedup: Share of layers saved, the router's cost taken off.
        measured_speedup: Share of the time saved; ``None`` if nothing was timed.
        correct_N: For each query 1 if the answer is right, else 0; in between where seeds or budgets are averaged.
    """

    mean_pruned_layers: float
    nominal_speedup: float
    measured_speedup: float | None
    correct_N: npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class BudgetCurve:
    """A method at all of its budgets, on the same queries in the same order.

    The unpruned SLM, at speed 0, may be a point of any method's curve: nobody has to prune.

    Attributes:
        name: Name of the method, as rows of the table are named: ``router-dpo``, ``static``.
        points: Its budgets, in any order.
    """

    name: str
    points: Sequence[BudgetPoint]

    def __post_init__(self) -> None:
        """Checks the points.

        Raises:
            ValueError: There are none, they have different numbers of queries, or a correctness is not in [0, 1].
        """
        if not self.points:
            raise ValueError(f"The budget curve of {self.name} has no points; evaluate it at one budget at least.")
        if len(counts := {len(point.correct_N) for point in self.points}) > 1:
            raise ValueError(
                f"The points of {self.name}'s budget curve have different numbers of queries ({sorted(counts)}); evaluate "
                f"every budget on the same queries."
            )
        if not all(((point.correct_N >= 0) & (point.correct_N <= 1)).all() for point in self.points):
            raise ValueError(f"The correctness of a query lies in [0, 1], but the curve of {self.name} has another one.")


def average_seeds(curves: Sequence[BudgetCurve]) -> BudgetCurve:
    """Averages the curves of one method over its seeds: budget by budget, query by query.

    A point's accuracy and nominal speedup are those of a method that draws one of the seeds for each query. Why the seeds
    are averaged before queries are resampled: see `dynprune.evaluation.comparisons`.

    Args:
        curves: One curve a seed, with the same budgets in the same order.

    Returns:
        Their mean, under the first one's name.

    Raises:
        ValueError: There are no curves, or their numbers of budgets or of queries differ.
    """
    shapes = {(len(curve.points), len(curve.points[0].correct_N)) for curve in curves}
    if len(shapes) != 1:
        raise ValueError(
            f"Curves of seeds are averaged budget by budget and query by query, but their budgets and queries are "
            f"{sorted(shapes)}; give at least one seed, and all of them the same budgets and queries."
        )
    budgets = zip(*(curve.points for curve in curves), strict=True)
    return BudgetCurve(curves[0].name, [_mix(points, np.ones(len(points))) for points in budgets])


def merge_equal(curve: BudgetCurve) -> BudgetCurve:
    """Makes one point of those with equal layers and nominal speedup, such as sets of one size drawn at random.

    Its accuracy and measured speedup are their means; it has no measured one where one of them was not timed.

    Args:
        curve: The method.

    Returns:
        The curve, its points in the order in which each budget came first.
    """
    budgets: dict[tuple[float, float], list[BudgetPoint]] = {}
    for point in curve.points:
        budgets.setdefault((round(point.mean_pruned_layers, 9), round(point.nominal_speedup, 9)), []).append(point)
    return BudgetCurve(curve.name, [_mix(points, np.ones(len(points))) for points in budgets.values()])


def covers(curve: BudgetCurve, speed: float, axis: Axis = "nominal_speedup") -> bool:
    """Whether `at_speed` knows the curve there."""
    speeds = [getattr(point, axis) for point in _known(curve, axis)]
    return bool(speeds) and min(speeds) - _ROUNDING <= speed <= max(speeds) + _ROUNDING


def at_speed(curve: BudgetCurve, speed: float, axis: Axis = "nominal_speedup") -> BudgetPoint:
    """The method at a speed between its budgets, by linear interpolation for each query.

    This is no guess about budgets that nobody ran: a method that answers each query at the one or at the other neighbouring
    budget, by a coin with the weights of the interpolation, has exactly this expected accuracy, this mean of pruned layers
    and this nominal speedup. (For the measured speedup, a median, it is an approximation.) The interpolated correctness of
    a query is that method's chance to get it right, so that two methods can be compared by query at equal speed.

    Args:
        curve: The method. Budgets of equal speed count as one, by their mean.
        speed: The speed, in the axis's unit: layers, or a share.
        axis: What speed means. Points that have none are left out.

    Returns:
        The point at that speed.

    Raises:
        ValueError: The speed is outside the curve's range, or nothing was timed.
    """
    points = _known(curve, axis)
    if not points:
        raise ValueError(f"The curve of {curve.name} has no {axis}; time it with evaluation.latency.queries=24.")
    speed_P = np.array([getattr(point, axis) for point in points])
    if not covers(curve, speed, axis):
        raise ValueError(
            f"The curve of {curve.name} goes from {speed_P.min():.4g} to {speed_P.max():.4g} in {axis}, so nothing is known at "
            f"{speed:.4g}; ask for a speed in that range, or evaluate budgets on both sides of it."
        )
    speed = float(np.clip(speed, speed_P.min(), speed_P.max()))
    below, above = speed_P[speed_P <= speed].max(), speed_P[speed_P >= speed].min()
    share = (speed - below) / (above - below) if above > below else 0.0
    at_below_P, at_above_P = speed_P == below, speed_P == above
    return _mix(points, (1 - share) * at_below_P / at_below_P.sum() + share * at_above_P / at_above_P.sum())


def compare_at_speed(
    curve_a: BudgetCurve, curve_b: BudgetCurve, speed: float, axis: Axis = "nominal_speedup"
) -> PairedDifference:
    """Compares the accuracy of two methods at equal speed, paired by query.

    Args:
        curve_a: A method.
        curve_b: The method to compare with, on the same queries in the same order.
        speed: The speed, in the axis's unit.
        axis: What speed means.

    Returns:
        Accuracy of `curve_a` minus accuracy of `curve_b` with its BCa interval over queries, given the speeds of the
        budgets: these are what the methods had on these queries, and are not resampled.

    Raises:
        ValueError: The speed is outside a curve's range, nothing was timed, or the numbers of queries differ.
    """
    return paired_difference(at_speed(curve_a, speed, axis).correct_N, at_speed(curve_b, speed, axis).correct_N)


def gap_closed(
    router: BudgetCurve, static: BudgetCurve, oracle: BudgetCurve, speed: float, axis: Axis = "nominal_speedup"
) -> Interval | None:
    """Share of the way from the best static set to the oracle that a router goes, at equal speed.

    (router - static) / (oracle - static), each the accuracy over all queries: 0 is no better than static, 1 is the oracle,
    and below 0 is worse than static.

    Args:
        router: The router.
        static: The best static sets.
        oracle: The best configuration tried for each query.
        speed: The speed, in the axis's unit.
        axis: What speed means.

    Returns:
        The share with its BCa interval over queries; ``None`` where the oracle is not better than static, or not by more
        than chance (see `ratio_interval`): a share of a gap that is not there is undefined.

    Raises:
        ValueError: The speed is outside a curve's range, nothing was timed, or the numbers of queries differ.
    """
    router_N, static_N, oracle_N = (at_speed(curve, speed, axis).correct_N for curve in (router, static, oracle))
    if len({len(router_N), len(static_N), len(oracle_N)}) > 1:
        raise ValueError(
            f"A share of the gap needs the same queries for all, but the router has {len(router_N)}, static {len(static_N)} "
            f"and the oracle {len(oracle_N)}."
        )
    return ratio_interval(router_N - static_N, oracle_N - static_N)


def _known(curve: BudgetCurve, axis: Axis) -> list[BudgetPoint]:
    return [point for point in curve.points if getattr(point, axis) is not None]


def _mix(points: Sequence[BudgetPoint], weight_P: npt.NDArray[np.float64]) -> BudgetPoint:
    """The mean of points, as if each query were answered at one of them, drawn with these weights."""
    used = [(point, weight) for point, weight in zip(points, weight_P, strict=True) if weight > 0]
    weights = [weight for _, weight in used]
    measured = [point.measured_speedup for point, _ in used]
    return BudgetPoint(
        mean_pruned_layers=float(np.average([point.mean_pruned_layers for point, _ in used], weights=weights)),
        nominal_speedup=float(np.average([point.nominal_speedup for point, _ in used], weights=weights)),
        measured_speedup=None if None in measured else float(np.average(np.array(measured, dtype=float), weights=weights)),
        correct_N=np.average([point.correct_N for point, _ in used], axis=0, weights=weights),
    )
