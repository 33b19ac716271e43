"""The rows of the trained routers: each router as it is, at each budget, and at the largest budget that is safe."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from dynprune.artifacts import Artifact
from dynprune.data.rollouts import completed_ids
from dynprune.data.tasks import Query
from dynprune.evaluation.accuracy import RIGHT_BY
from dynprune.evaluation.risk_control import fewest_queries, last_controlled
from dynprune.router.budget import bonus_for_mean, same_count, with_bonus
from dynprune.stages.explore import explore
from dynprune.stages.router import TrainedRouter, router_layers, trained_router
from dynprune.stages.rows import ORIGINAL, Row
from dynprune.stages.run import Run, once_a_run
from dynprune.stages.samples import Answers, run_rows

log = logging.getLogger(__name__)
BUDGET_RULES = ("same", "mean")
"""Of ``evaluation.budget_rule``: as many layers for every query, or on average over queries."""


@dataclass(frozen=True)
class TrainedMethod:
    """The routers that a method trained.

    Attributes:
        name: The method's name in the table.
        learns_from: What it learns from, see `RouterTraining.learns_from`.
        routers: The router of each seed.
        run: The run, with the router's settings that are the method's own.
    """

    name: str
    learns_from: str
    routers: Mapping[int, Artifact]
    run: Run


def router_rows(run: Run, methods: Sequence[TrainedMethod]) -> list[Row]:
    """The rows of all methods: of each seed's router its own row, one for each budget, and that of the largest safe budget."""
    groups = [
        _budget_rows(method, seed, artifact, position == 0)
        for method in methods
        for position, (seed, artifact) in enumerate(method.routers.items())
    ]
    settings = run.config.evaluation.guarantee
    if settings.loss is None:
        return [row for group in groups for row in group]
    lost = _lost(run, [row for _, *budgets in groups for row in budgets])
    rows = []
    for own, *budgets in groups:
        safe = last_controlled([(row, lost[row.name]) for row in budgets], settings.loss, settings.confidence)
        log.info("%s: the largest safe budget is that of %s", own.name, safe.name if safe else "no row, so the full SLM runs")
        chosen = safe or replace(ORIGINAL, seed=own.seed, timed=own.timed)
        rows += [own, *budgets, replace(chosen, name=f"{own.name}@safe", curve=None)]
    return rows


def _budget_rows(method: TrainedMethod, seed: int, artifact: Artifact, timed: bool) -> list[Row]:
    """A router's own row, and one for each budget, the smallest first."""
    run = method.run
    curve = f"router-{method.name}"
    name = curve + (f"-s{seed}" if len(method.routers) > 1 else "")
    trained = trained_router(run, artifact)
    own = Row(name, trained.chooser(), artifact.fingerprint, router_layers(run), seed=seed, timed=timed)

    @cache
    def log_p_count() -> torch.Tensor:
        explored, _ = validation_queries(run)
        return torch.cat([trained.policy.log_p_count(trained.outputs(query)) for query in explored])

    budgets = sorted(run.config.evaluation.budgets)
    return [own, *(replace(_budget_row(run, own, trained, budget, log_p_count), curve=curve) for budget in budgets)]


def _budget_row(run: Run, own: Row, trained: TrainedRouter, budget: float, log_p_count: Callable[[], torch.Tensor]) -> Row:
    """The row of a router that is told which nominal speedup to reach.

    Args:
        run: The run.
        own: The router's own row.
        trained: The router.
        budget: The nominal speedup.
        log_p_count: Gives log P(k|x) of the explored validation queries.
    """
    layers = budget * run.slm.num_layers + own.router_layers
    if not 0 <= layers <= trained.policy.k_max:
        raise ValueError(
            f"evaluation.budgets: a nominal speedup of {budget:g} needs {layers:g} pruned layers, the router's cost included, "
            f"but {own.name} prunes 0 to {trained.policy.k_max}; lower the budget, or raise router.k_max "
            "(of its own settings in evaluation.router_settings, if it has any)"
        )
    if run.config.evaluation.budget_rule == "same":
        # At least the speedup that is asked for; the slack is for products such as 0.1 · 30.
        k = math.ceil(layers - 1e-9)
        count, told = same_count(k), f"k={k}"
    else:
        bonus = bonus_for_mean(log_p_count(), layers)
        count, told = with_bonus(bonus), f"bonus={bonus!r}"
    return replace(own, name=f"{own.name}@{budget:g}", choose=trained.chooser(count), origin=f"{own.origin} {told}")


def _lost(run: Run, rows: Sequence[Row]) -> dict[str, list[bool]]:
    """By row, which held-back queries the full SLM gets right and the row wrong."""
    _, held_back = validation_queries(run)
    settings = run.config.evaluation.guarantee
    if len(held_back) < (fewest := fewest_queries(settings.loss, settings.confidence)):
        raise ValueError(
            f"evaluation.guarantee: a loss of {settings.loss} with confidence {settings.confidence} can be guaranteed by "
            f"{fewest} validation queries at least, but only {len(held_back)} are left that the router's training did not see; "
            "lower exploration.max_validation_queries, raise data.splits.validation, or allow a larger loss"
        )
    samples = run_rows(run, [ORIGINAL, *rows], held_back_answers(run))

    def lost(row: Row) -> list[bool]:
        pairs = zip(samples["original"], samples[row.name], strict=True)
        return [full.scores[RIGHT_BY] == 1 and pruned.scores[RIGHT_BY] < 1 for full, pruned in pairs]

    return {row.name: lost(row) for row in rows}


@once_a_run
def held_back_answers(run: Run) -> Answers:
    """What rows say to the validation queries that were not explored; all of them where none is left."""
    explored, held_back = validation_queries(run)
    return Answers(run, held_back or explored)


def validation_queries(run: Run) -> tuple[list[Query], list[Query]]:
    """The explored validation queries, and the others: those have chosen checkpoints, so a guarantee must not rest on them."""
    explored = completed_ids(explore(run, "validation").folder)
    queries = run.queries("validation", None, "evaluation.guarantee")
    return [query for query in queries if query.id in explored], [query for query in queries if query.id not in explored]
