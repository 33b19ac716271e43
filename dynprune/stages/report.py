"""The stage ``report``: the table and the figures of a run, in ``report/`` of its folder."""

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from rich.console import Console

from dynprune.data.splits import function_groups
from dynprune.evaluation.accuracy import RIGHT_BY, Sample
from dynprune.evaluation.agreement import agreement
from dynprune.evaluation.cells import Grid
from dynprune.evaluation.comparisons import Comparison, compare, over_seeds
from dynprune.evaluation.curves import BudgetCurve
from dynprune.evaluation.figures import (
    accuracy_speedup,
    budget_curve,
    layer_counts,
    layers_pruned,
    pruning_frequency,
)
from dynprune.evaluation.headline import write_headline
from dynprune.evaluation.html_report import choose_examples, write_run_report
from dynprune.evaluation.latency import Timing
from dynprune.evaluation.layer_error import layer_error
from dynprune.evaluation.machine import describe_machine, versions
from dynprune.evaluation.parts import AdapterPart, Part
from dynprune.evaluation.run_results import AskedQuery, seal_report, typed, write_parts, write_queries
from dynprune.evaluation.speedup import measured_speedup, nominal_speedup
from dynprune.evaluation.statistics import mean_interval, median_interval
from dynprune.evaluation.table import Lossless, TableRow, grids, render_table, write_table
from dynprune.evaluation.training_curves import TrainingCurve, training_curves
from dynprune.stages.adapters import adapter_part, adapters
from dynprune.stages.budgets import STATIC_CURVES, budget_curves, check_table, headline_of
from dynprune.stages.evaluate import Evaluation, evaluate, train_routers
from dynprune.stages.explore import exploration_part, explore
from dynprune.stages.router import read_curves
from dynprune.stages.rows import Row
from dynprune.stages.run import Run
from dynprune.stages.samples import write_samples
from dynprune.tracking import track_report

log = logging.getLogger(__name__)
# Layers by which a static set may differ from a router and still be of its size.
_SAME_SIZE = 0.5
# The figures of report.html, in their order there.
_PICTURES = ("accuracy_speedup", "budget_curve", "layer_counts", "layers_pruned", "layer_error", "training_curves")


def report(run: Run) -> Path:
    """Writes table, samples and figures, and shows the table.

    Returns:
        The folder.
    """
    folder, new = run.folder / "report", run.folder / ".report"
    check_table(run.config)
    if run.store.rank > 0:
        # The other processes of a distributed run train along; evaluating and timing is for the first one alone.
        train_routers(run)
        return folder
    evaluation = evaluate(run)
    rows = [_table_row(run, row, evaluation) for row in evaluation.rows]
    comparisons = _comparisons(evaluation)
    machine = {**describe_machine(), "dtype": run.model_identity["dtype"]}
    config = run.shown_config
    seeds = {name: over_seeds(scores) for name, scores in _by_name(evaluation).items() if len(scores) > 1}
    # What an earlier run of this name wrote may be about other rows: it is replaced as a whole.
    shutil.rmtree(new, ignore_errors=True)
    write_table(
        rows, new, machine, versions(), config, comparisons, seeds, typed(), run.store.plugins, run.inputs, run.slm.num_layers
    )
    write_queries(new, evaluation.queries)
    for name, samples in evaluation.samples.items():
        write_samples(samples, new / "samples" / f"{name}.jsonl")
    curves = budget_curves(evaluation, rows)
    if run.config.evaluation.headline:
        write_headline(headline_of(run, evaluation, rows, curves), new / "figures.json")
    parts = _parts(run, evaluation)
    learned = read_curves({method.name: list(method.routers.values()) for method in evaluation.methods})
    _write_figures(run, evaluation, rows, list(curves.values()), parts, learned, new)
    _write_html(run, evaluation, grids(rows, comparisons, seeds), machine, config, new)
    write_parts(new, run.config.seed, parts, learned)
    seal_report(new)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
    track_report(folder)
    Console().print(render_table(rows))
    for path in sorted(folder.iterdir()):
        log.info("wrote %s", os.path.relpath(path))
    return folder


def _parts(run: Run, evaluation: Evaluation) -> dict[str, Part]:
    """What the table was made with."""
    parts: dict[str, Part] = {}
    artifact = adapters(run)
    if artifact is not None:
        parts["adapters"] = adapter_part(artifact)
    # For ready routers nothing needed to be explored.
    if any(method.run.config.router.folder is None for method in evaluation.methods):
        parts["exploration"] = exploration_part(run, explore(run))
    return parts


def _write_figures(
    run: Run,
    evaluation: Evaluation,
    rows: Sequence[TableRow],
    curves: Sequence[BudgetCurve],
    parts: Mapping[str, Part],
    learned: Mapping[str, Sequence[TrainingCurve]],
    folder: Path,
) -> None:
    """Writes the figures of what there is."""
    drawn = drawn_rows(evaluation.rows)
    accuracy_speedup([row for row in rows if row.name in drawn], folder / "accuracy_speedup.png")
    if curves:
        budget_curve(curves, rows[0].scores[RIGHT_BY], folder / "budget_curve.png")
    pruned = [row for row in evaluation.rows if _is_pruned(row)]
    layers_of = {row.name: [sample.pruned_layers for sample in evaluation.samples[row.name]] for row in pruned}
    if pruned:
        frequencies = {name: pruning_frequency(layers, run.slm.num_layers) for name, layers in layers_of.items()}
        layers_pruned(frequencies, folder / "layers_pruned.png")
    if choosing := [row.name for row in pruned if not row.origin.startswith("[")]:
        layer_counts({name: list(map(len, layers_of[name])) for name in choosing}, folder / "layer_counts.png")
    if isinstance(part := parts.get("adapters"), AdapterPart):
        layer_error(part.mse, part.relative_error, folder / "layer_error.png")
    if learned:
        training_curves(learned, folder / "training_curves.png")


def _write_html(
    run: Run, evaluation: Evaluation, all_grids: Sequence[Grid], machine: Mapping[str, Any], config: Any, folder: Path
) -> None:
    """Writes ``report.html``, with the figures that are in the folder."""
    routers = [row.name for row in evaluation.rows if row.name.startswith("router-") and "@" not in row.name]
    pruned = [row.name for row in evaluation.rows if _is_pruned(row)]
    examples = []
    if pruned:
        about, *others = [*routers, *(name for name in pruned if name not in routers)]
        asked = [AskedQuery.of(query) for query in evaluation.queries]
        examples = choose_examples(asked, evaluation.samples, about, others, run.slm.num_layers)
    write_run_report(
        folder / "report.html",
        str(run.config.name),
        [
            run.slm.name,
            f"{len(evaluation.queries)} queries of the test split",
            datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        ],
        all_grids,
        [path for path in (folder / f"{name}.png" for name in _PICTURES) if path.exists()],
        examples,
        machine,
        versions(),
        OmegaConf.to_yaml(config),
    )


def _table_row(run: Run, row: Row, evaluation: Evaluation) -> TableRow:
    samples = evaluation.samples[row.name]
    mean_pruned = sum(len(sample.pruned_layers) for sample in samples) / len(samples)
    scores = {name: [sample.scores[name] for sample in samples] for name in samples[0].scores}
    scores["agreement"] = agreement([s.output for s in samples], [s.output for s in evaluation.samples["original"]])
    return TableRow(
        name=row.name,
        n=len(samples),
        scores={name: mean_interval(values) for name, values in scores.items()},
        mean_pruned_layers=mean_pruned,
        nominal_speedup=nominal_speedup(mean_pruned, row.router_layers, run.slm.num_layers),
        truncated=sum(sample.truncated for sample in samples),
        lossless=_lossless(samples, *evaluation.differences[row.name]) if row.drafting is not None else None,
        **_times(row.name, evaluation.timings),
    )


def _is_pruned(row: Row) -> bool:
    return row.name != "original" and row.drafting is None


def drawn_rows(rows: Sequence[Row]) -> list[str]:
    """Names of the rows that the figure of accuracy and speedup has: dozens of points cannot be told apart.

    Of a router's seeds it has the one that is timed, and of that no row that another one lies on already: the largest safe
    budget is one of the others, or the full SLM.
    """
    origins: set[str] = set()
    names = []
    for row in rows:
        if row.seed is None or (row.timed and row.origin not in origins):
            names.append(row.name)
        origins.add(row.origin)
    return names


def _lossless(samples: list[Sample], near_ties: int, unexplained: int) -> Lossless:
    totals = {name: sum(sample.drafts[name] for sample in samples) for name in samples[0].drafts}
    tokens = sum(len(sample.token_ids) + (not sample.truncated) for sample in samples)
    return Lossless(tokens=tokens, near_ties=near_ties, unexplained=unexplained, **totals)


def _times(name: str, timings: list[Timing]) -> dict[str, Any]:
    full = {timing.id: timing for timing in timings if timing.row == "original"}
    mine = [timing for timing in timings if timing.row == name]
    if not mine:
        return {}
    base = [full[timing.id] for timing in mine]
    return {
        "measured_speedup": measured_speedup([t.total for t in mine], [t.total for t in base]),
        "prefill_speedup": measured_speedup([t.route + t.prefill for t in mine], [t.route + t.prefill for t in base]),
        "decode_speedup": measured_speedup([t.decode for t in mine], [t.decode for t in base]),
        "seconds": median_interval([t.total for t in mine]),
        "cache_mib": median_interval([t.cache_bytes / 2**20 for t in mine]),
        "timed": len(mine),
    }


def _comparisons(evaluation: Evaluation) -> list[Comparison]:
    """Every row against the unpruned SLM, routers against static sets of their size and against those of their budget.

    What has several seeds is compared by its averages over them, see `dynprune.evaluation.comparisons`.
    """
    named = {row.over_seeds: row for row in evaluation.rows}
    layers = {name: np.mean([len(s.pruned_layers) for s in evaluation.samples[row.name]]) for name, row in named.items()}
    statics = [name for name, row in named.items() if row.curve in STATIC_CURVES]
    routers = [name for name in named if name.startswith("router-")]
    pairs = [(name, "original") for name, row in named.items() if _is_pruned(row)]
    pairs += [(a, b) for a in routers for b in statics if abs(layers[a] - layers[b]) <= _SAME_SIZE]
    # The same size of a static set, searched under other adapters.
    pairs += [(static, name) for static in statics for name in named if name.startswith(f"{static}-")]
    budget_of = {name: name.partition("@")[2] for name in routers}
    pairs += [(a, b) for i, a in enumerate(routers) for b in routers[:i] if budget_of[a] == budget_of[b]]
    return compare(_by_name(evaluation), pairs, RIGHT_BY, function_groups(evaluation.queries)) if pairs else []


def _by_name(evaluation: Evaluation) -> dict[str, list[list[float]]]:
    """Whether each answer is right, [S, N]: by the rows' names without seeds, seed by seed."""
    found: dict[str, list[list[float]]] = {}
    for row in evaluation.rows:
        correct = [sample.scores[RIGHT_BY] for sample in evaluation.samples[row.name]]
        found.setdefault(row.over_seeds, []).append(correct)
    return found
