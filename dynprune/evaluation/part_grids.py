"""The parts of several runs as tables of text: adapters, explorations, and routers that were trained alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dynprune.evaluation.cells import ABSENT, Grid, number
from dynprune.evaluation.parts import AdapterPart, ExplorationPart, PartEntry, RouterPart

_SPREAD = "± the standard deviation over seeds"


def part_grids(
    adapters: Sequence[PartEntry[AdapterPart]],
    explorations: Sequence[PartEntry[ExplorationPart]],
    routers: Sequence[PartEntry[RouterPart]],
) -> list[Grid]:
    """A table for each part that there is, narrow enough for a terminal."""
    grids = []
    if adapters:
        header = ["Setting", "Seeds", "Relative error", "Median MSE", "Largest MSE", "Worst layers"]
        note = ". Over layers, on held-out states; relative error: as a share of what a layer changes, mean over layers."
        grids.append(Grid("Adapters", note, header, [_adapters(entry) for entry in adapters]))
    if explorations:
        header = ["Setting", "Seeds", "Queries", "Rollouts", "Right, %", "Layers", "Deepest right", "Variance"]
        note = (
            f" of the train split, {_SPREAD}. Right: of the rollouts that prune. Layers: mean number they prune. Deepest "
            "right: most layers pruned with success, mean over queries. Variance: of the scores of a query's rollouts, mean "
            "over queries."
        )
        grids.append(Grid("Exploration", note, header, [_exploration(entry) for entry in explorations]))
    if routers:
        header = ["Setting", "Seeds", "Pairs in order, %", "Validation loss"]
        note = f", {_SPREAD}. Pairs in order: held-out pairs in which the winner is likelier."
        grids.append(Grid("Routers on held-out queries", note, header, [_router(entry) for entry in routers]))
    return grids


def layer_error_grid(adapters: Sequence[PartEntry[AdapterPart]]) -> Grid:
    """Layer by layer, the mean squared error of each setting's adapter."""
    settings = [shown_setting(entry.setting) for entry in adapters]
    num_layers = max(len(entry.mean.mse) for entry in adapters)
    lines = [
        [str(layer), *(_error(entry.mean.mse[layer]) if layer < len(entry.mean.mse) else ABSENT for entry in adapters)]
        for layer in range(num_layers)
    ]
    return Grid("Mean squared error by layer", ", on held-out states.", ["Layer", *settings], lines)


def shown_setting(setting: str) -> str:
    """What stands for a setting in a table: there may be one alone, of which nothing differs."""
    return setting or "all"


def _adapters(entry: PartEntry[AdapterPart]) -> list[str]:
    mse_L = np.array(entry.mean.mse)
    worst = np.argsort(-mse_L, kind="stable")[:3]
    return [
        shown_setting(entry.setting),
        str(entry.seeds),
        number(float(np.mean(entry.mean.relative_error)), 3),
        _error(float(np.median(mse_L))),
        _error(float(mse_L.max())),
        ", ".join(map(str, worst)),
    ]


def _exploration(entry: PartEntry[ExplorationPart]) -> list[str]:
    return [
        shown_setting(entry.setting),
        str(entry.seeds),
        number(entry.mean.queries, 0),
        number(entry.mean.rollouts, 0),
        _with_spread(entry, "success", 100),
        _with_spread(entry, "pruned_layers", 1),
        _with_spread(entry, "deepest_success", 1),
        _with_spread(entry, "score_variance", 1, 3),
    ]


def _router(entry: PartEntry[RouterPart]) -> list[str]:
    return [
        shown_setting(entry.setting),
        str(entry.seeds),
        _with_spread(entry, "preference_accuracy", 100),
        _with_spread(entry, "validation_loss", 1, 3),
    ]


def _with_spread(entry: PartEntry[Any], figure: str, scale: float, digits: int = 1) -> str:
    mean, spread = (ABSENT if of is None else number(scale * getattr(of, figure), digits) for of in (entry.mean, entry.spread))
    return mean if spread == ABSENT else f"{mean} ± {spread}"


def _error(value: float) -> str:
    """Errors of layers lie orders of magnitude apart."""
    return f"{value:.3g}"
