"""Budget curves of a table's methods, and the headline that follows from them."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dynprune.baselines.static_search import check_candidates
from dynprune.evaluation.accuracy import RIGHT_BY, Sample
from dynprune.evaluation.curves import BudgetCurve, BudgetPoint, average_seeds
from dynprune.evaluation.headline import HIGH_SPEEDUP, Headline, headline
from dynprune.evaluation.table import TableRow
from dynprune.stages.evaluate import Evaluation
from dynprune.stages.router import learns_from
from dynprune.stages.router_rows import BUDGET_RULES, held_back_answers
from dynprune.stages.rows import Row
from dynprune.stages.run import Run
from dynprune.stages.samples import run_rows
from dynprune.stages.searched_sets import SEARCHED

STATIC_CURVES = ("static", "static_accuracy")
"""The curves of searched static sets, of which the best on validation queries is what routers have to beat."""


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


def check_table(config: DictConfig) -> None:
    """Refuses a table that could not be finished, before hours are spent on it.

    Raises:
        ValueError: If there is no such rule for budgets, settings are of no router of the table, a guarantee has no budgets to
            choose from, static sets are larger than what they are searched among, or the headline is asked for and a curve that
            it needs is not.
    """
    settings = config.evaluation
    if settings.budget_rule not in BUDGET_RULES:
        raise ValueError(f"evaluation.budget_rule={settings.budget_rule!r} is unknown; allowed: {', '.join(BUDGET_RULES)}")
    _check_router_settings(config)
    if settings.guarantee.loss is not None and not settings.budgets:
        raise ValueError("evaluation.guarantee needs budgets to choose from; set evaluation.budgets, for example [0,0.1,0.2]")
    searched = [settings.static, *(settings.baselines[name].sizes for name in SEARCHED)]
    if settings.pruned_layers is None and any(searched):
        check_candidates(settings.static_candidates, max(size for sizes in searched for size in sizes))
    needed = {
        "evaluation.static, for example [2,4,6,8]": settings.static,
        "evaluation.baselines.oracle.sizes, for example [0,2,4,6,8]": settings.baselines.oracle.sizes,
        "two budgets or more, for example evaluation.budgets=[0,0.1,0.2]": len(settings.budgets) > 1,
        "static sets of the sizes in evaluation.adapter_ablation.sizes": not settings.adapter_ablation.adapters
        or set(settings.adapter_ablation.sizes) & set(settings.static),
        "evaluation.pruned_layers=null": settings.pruned_layers is None,
        "fbc in evaluation.routers": "fbc" in settings.routers,
        "a method that learns from pairs in evaluation.routers": any(
            learns_from(method) == "pairs" for method in settings.routers.values()
        ),
    }
    missing = [what for what, there in needed.items() if not there]
    if settings.headline and missing:
        raise ValueError(f"evaluation.headline=true needs {'; '.join(missing)}")


def _check_router_settings(config: DictConfig) -> None:
    settings = config.evaluation
    names = list(settings.routers) or [config.method.name]
    for name, own in settings.router_settings.items():
        key = f"evaluation.router_settings.{name}"
        if name not in names:
            raise ValueError(f"{key} is about no router of the table; allowed: {', '.join(names)}")
        if not isinstance(own, DictConfig):
            raise ValueError(f"{key}={own} is no settings; allowed: keys of the group router, for example {key}.inputs=none")
        try:
            OmegaConf.merge(config.router, own)
        except OmegaConfBaseException as error:
            # Its first line; the others are about the configuration's types.
            raise ValueError(f"{key}: {str(error).splitlines()[0]}; allowed: keys of the group router") from None


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
    validated = _validated(run, evaluation, [*routers, *(name for name in STATIC_CURVES if name in curves)])
    best, best_preference, best_static = (
        max((name for name in names if name in validated), key=lambda name: validated[name])
        for names in (routers, preference, STATIC_CURVES)
    )
    [chosen] = [method for method in evaluation.methods if f"router-{method.name}" == best]
    accuracies = [artifact.manifest["counts"]["preference_accuracy"] for artifact in chosen.routers.values()]
    return headline(
        _correct(evaluation.samples["original"]),
        curves[best],
        curves[best_static],
        curves["oracle"],
        curves[best_preference],
        curves["router-fbc"],
        seeds=len(chosen.routers),
        preference_accuracy=float(np.mean(accuracies)),
        context_aware_gain=_adapters_gain(run, evaluation),
        lossless_speedup=_lossless_speedup(table),
    )


def _validated(run: Run, evaluation: Evaluation, names: Sequence[str]) -> dict[str, float]:
    """Accuracy of each curve at the headline's speedup, averaged over seeds, on validation queries that chose nothing else.

    Of each curve the two rows on both sides of that speedup are run, and interpolated.
    """
    target = HIGH_SPEEDUP * run.slm.num_layers
    layers = {row.name: _mean_layers(evaluation.samples[row.name]) - row.router_layers for row in evaluation.rows}
    # By curve and seed.
    near: dict[tuple[str, int | None], list[Row]] = {}
    for row in evaluation.rows:
        if row.curve is not None and row.curve in names:
            near.setdefault((row.curve, row.seed), []).append(row)
    for place, rows in near.items():
        below = max((row for row in rows if layers[row.name] <= target), key=lambda row: layers[row.name], default=None)
        above = min((row for row in rows if layers[row.name] >= target), key=lambda row: layers[row.name], default=None)
        near[place] = [row for row in (below, above) if row is not None]
    samples = run_rows(run, [row for rows in near.values() for row in rows], held_back_answers(run))
    found: dict[str, list[float]] = {}
    for (curve, _), rows in near.items():
        correct = [float(_correct(samples[row.name]).mean()) for row in rows]
        found.setdefault(curve, []).append(float(np.interp(target, [layers[row.name] for row in rows], correct)))
    return {curve: float(np.mean(at_target)) for curve, at_target in found.items()}


def _adapters_gain(run: Run, evaluation: Evaluation) -> float | None:
    """What the run's adapters gain over the first other ones, both under their own static set of the largest size compared."""
    ablation = run.config.evaluation.adapter_ablation
    if not ablation.adapters:
        return None
    size, name = max(set(ablation.sizes) & set(run.config.evaluation.static)), next(iter(ablation.adapters))
    ours, theirs = evaluation.samples[f"static-{size}"], evaluation.samples[f"static-{size}-{name}"]
    return float(_correct(ours).mean() - _correct(theirs).mean())


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
    """Gives all seeds the measured speedups of the one that is timed, where all prune as many layers at each budget."""
    timed = next((curve for curve in curves if all(point.measured_speedup is not None for point in curve.points)), None)
    sizes = {tuple(point.mean_pruned_layers for point in curve.points) for curve in curves}
    if timed is None or len(sizes) > 1:
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
    return np.array([sample.scores[RIGHT_BY] for sample in samples], dtype=np.float64)


def _mean_layers(samples: Sequence[Sample]) -> float:
    return float(np.mean([len(sample.pruned_layers) for sample in samples]))
