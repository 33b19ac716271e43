"""Budget curves of a table's methods, and the headline that follows from them."""

import json
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from omegaconf import DictConfig

from dynprune.evaluation.accuracy import Sample
from dynprune.evaluation.curves import BudgetCurve, BudgetPoint, average_seeds
from dynprune.evaluation.headline import HIGH_SPEEDUP, Headline, headline
from dynprune.evaluation.table import TableRow
from dynprune.stages.evaluate import Evaluation
from dynprune.stages.router import learns_from
from dynprune.stages.rows import Row
from dynprune.stages.run import Run
from dynprune.stages.samples import Answers, run_row

_SCORE = "ast_match"
_STATIC_CURVES = ("static", "static_accuracy")


def budget_curves(evaluation: Evaluation, table: Sequence[TableRow]) -> dict[str, BudgetCurve]:
    """The curve of each method that has rows at several budgets, averaged over its seeds.

    The unpruned SLM is a point of every curve that pays for no router: nobody has to prune.

    Args:
        evaluation: The rows and what they said.
        table: The same rows of the table, in the same order.
    """
    numbers = {row.name: row for row in table}
    by_seed: dict[str, dict[int | None, list[BudgetPoint]]] = {}
    for row in evaluation.rows:
        if row.curve is not None:
            point = _point(numbers[row.name], evaluation.samples[row.name])
            by_seed.setdefault(row.curve, {}).setdefault(row.seed, []).append(point)
    full = _point(numbers["original"], evaluation.samples["original"])
    free = {row.curve for row in evaluation.rows if not row.router_layers}
    curves = {}
    for name, points_of in by_seed.items():
        seeds = [BudgetCurve(name, [*([full] if name in free else []), *points]) for points in points_of.values()]
        if len(seeds[0].points) > 1:
            curves[name] = average_seeds(_timed_alike(seeds))
    return curves


def check_headline(config: DictConfig) -> None:
    """Refuses a configuration whose table lacks what its headline needs, before hours are spent on it.

    Raises:
        ValueError: If the headline is asked for and a curve that it needs is not.
    """
    settings = config.evaluation
    needed = {
        "evaluation.static, for example [2,4,6,8]": settings.static,
        "evaluation.baselines.oracle.sizes, for example [0,2,4,6,8]": settings.baselines.oracle.sizes,
        "evaluation.budgets, for example [0,0.1,0.2]": settings.budgets,
        "fbc in evaluation.routers": "fbc" in settings.routers,
        "a method that learns from pairs in evaluation.routers": any(
            learns_from(method) == "pairs" for method in settings.routers.values()
        ),
    }
    missing = [what for what, there in needed.items() if not there]
    if settings.headline and missing:
        raise ValueError(f"evaluation.headline=true needs {'; '.join(missing)}")


def headline_of(run: Run, evaluation: Evaluation, table: Sequence[TableRow], curves: Mapping[str, BudgetCurve]) -> Headline:
    """The headline; which router and which static sets are the best is decided on the validation split.

    Args:
        run: The run.
        evaluation: The rows and what they said.
        table: The same rows of the table.
        curves: See `budget_curves`.
    """
    preference = [f"router-{method.name}" for method in evaluation.methods if method.learns_from == "pairs"]
    routers = [f"router-{method.name}" for method in evaluation.methods]
    validated = _validated(run, evaluation, [*routers, *(name for name in _STATIC_CURVES if name in curves)])
    best, best_preference, best_static = (
        max((name for name in names if name in validated), key=lambda name: validated[name])
        for names in (routers, preference, _STATIC_CURVES)
    )
    [chosen] = [method for method in evaluation.methods if f"router-{method.name}" == best]
    accuracies = [
        json.loads((artifact.folder / "manifest.json").read_text(encoding="utf-8"))["counts"]["preference_accuracy"]
        for artifact in chosen.routers.values()
    ]
    return headline(
        _correct(evaluation.samples["original"]),
        curves[best],
        curves[best_static],
        curves["oracle"],
        curves[best_preference],
        curves["router-fbc"],
        seeds=len(chosen.routers),
        preference_accuracy=None if None in accuracies else float(np.mean(accuracies)),
        context_aware_gain=_adapters_gain(run, evaluation),
        lossless_speedup=_lossless_speedup(table),
    )


def _validated(run: Run, evaluation: Evaluation, names: Sequence[str]) -> dict[str, float]:
    """AST match on the validation split of each curve's row nearest to the headline's speedup, averaged over seeds."""
    answers = Answers(run, run.queries("validation", None, "data.splits.validation"))
    target = HIGH_SPEEDUP * run.slm.num_layers
    found: dict[str, float] = {}
    for name in names:
        of_seed: dict[int | None, list[Row]] = {}
        for row in evaluation.rows:
            if row.curve == name:
                of_seed.setdefault(row.seed, []).append(row)
        nearest = [
            min(rows, key=lambda row: abs(_mean_layers(evaluation.samples[row.name]) - row.router_layers - target))
            for rows in of_seed.values()
        ]
        if nearest:
            found[name] = float(np.mean([_correct(run_row(run, row, answers)) for row in nearest]))
    return found


def _adapters_gain(run: Run, evaluation: Evaluation) -> float | None:
    """What the run's adapters gain over the other ones, both under their own static set of the largest size compared."""
    ablation = run.config.evaluation.adapter_ablation
    if not ablation.adapters:
        return None
    size, name = max(ablation.sizes), next(iter(ablation.adapters))
    ours, theirs = (evaluation.samples.get(row) for row in (f"static-{size}", f"static-{size}-{name}"))
    return None if ours is None or theirs is None else float(_correct(ours).mean() - _correct(theirs).mean())


def _lossless_speedup(table: Sequence[TableRow]) -> float | None:
    """How many times as fast the fastest lossless row is."""
    saved = [row.measured_speedup.median for row in table if row.lossless is not None and row.measured_speedup is not None]
    return 1 / (1 - max(saved)) if saved else None


def _point(row: TableRow, samples: Sequence[Sample]) -> BudgetPoint:
    measured = row.measured_speedup.median if row.measured_speedup is not None else None
    if row.name == "original" and measured is not None:
        # Timed against itself.
        measured = 0.0
    return BudgetPoint(row.mean_pruned_layers, row.nominal_speedup, measured, _correct(samples))


def _timed_alike(curves: Sequence[BudgetCurve]) -> list[BudgetCurve]:
    """Gives all seeds the measured speedups of the one that is timed: they prune as many layers at each budget."""
    timed = next((curve for curve in curves if all(point.measured_speedup is not None for point in curve.points)), None)
    if timed is None:
        return list(curves)
    return [
        BudgetCurve(
            curve.name,
            [
                BudgetPoint(point.mean_pruned_layers, point.nominal_speedup, like.measured_speedup, point.correct_N)
                for point, like in zip(curve.points, timed.points, strict=True)
            ],
        )
        for curve in curves
    ]


def _correct(samples: Sequence[Sample]) -> npt.NDArray[np.float64]:
    return np.array([sample.scores[_SCORE] for sample in samples], dtype=np.float64)


def _mean_layers(samples: Sequence[Sample]) -> float:
    return float(np.mean([len(sample.pruned_layers) for sample in samples]))
