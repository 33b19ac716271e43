"""The stage ``evaluate``: runs the rows of the table on the test split, and times them against each other."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from dynprune.atomic import Pieces, replacing
from dynprune.data.tasks import Query
from dynprune.evaluation.accuracy import Sample
from dynprune.evaluation.latency import Timing, time_rows
from dynprune.evaluation.lossless import count_differences
from dynprune.evaluation.machine import describe_machine, versions
from dynprune.slm.pruning import LayerPruner
from dynprune.stages.adapters import adapters, pruner_of, upstream_of
from dynprune.stages.baselines import baseline_rows, oracle_names, oracle_rows, static_rows
from dynprune.stages.lossless import lossless_rows, timed_row
from dynprune.stages.progress import track
from dynprune.stages.router import check_fit, learns_from, router
from dynprune.stages.router_rows import TrainedMethod, router_rows
from dynprune.stages.rows import ORIGINAL, Row
from dynprune.stages.run import Run, digest, plain
from dynprune.stages.samples import Answers, run_rows

VERSION = 2


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` gives to the report.

    Attributes:
        queries: The test queries.
        methods: The routers.
        rows: The rows of the table, the original first.
        samples: By row, a sample for each query.
        timings: A timing for each row and timed query.
        differences: By lossless row, how many outputs differ from the original by rounding, and how many otherwise.
    """

    queries: list[Query]
    methods: list[TrainedMethod]
    rows: list[Row]
    samples: dict[str, list[Sample]]
    timings: list[Timing]
    differences: dict[str, tuple[int, int]]


def evaluate(run: Run) -> Evaluation:
    """Runs all rows of the configuration."""
    queries = run.queries("test", run.config.evaluation.max_queries, "evaluation.max_queries")
    methods = train_routers(run)
    answers = Answers(run, queries)
    rows = _rows(run, methods)
    # What is wrong with the lossless rows is said before the others are run.
    lossless_rows(run, [*rows, *(replace(ORIGINAL, name=name) for name in oracle_names(run))])
    samples = run_rows(run, rows, answers)
    # These depend on the others: on what they said, and on what they choose.
    oracles = list(oracle_rows(run, queries, samples)) if run.config.evaluation.pruned_layers is None else []
    samples |= run_rows(run, oracles, answers)
    rows += oracles
    lossless = lossless_rows(run, rows)
    samples |= run_rows(run, lossless, answers)
    rows += lossless
    with LayerPruner(run.slm) as pruner:
        differences = {
            row.name: count_differences(run.slm, pruner, queries, samples[row.name], samples["original"]) for row in lossless
        }
    for row, said in _under_other_adapters(run, queries, samples["original"]):
        rows.append(row)
        samples[row.name] = said
    timings = _time(run, [row for row in rows if row.timed], queries, samples["original"])
    return Evaluation(queries, methods, rows, samples, timings, differences)


def train_routers(run: Run) -> list[TrainedMethod]:
    """The routers that the table compares; trained where they are missing."""
    settings = run.config.evaluation
    if settings.pruned_layers is not None:
        return []
    methods: Mapping[str, DictConfig] = settings.routers or {run.config.method.name: run.config.method}
    seeds = plain(settings.router_seeds) or [run.config.seed]
    runs = {name: with_own_router(run, name) for name in methods}
    for name, method in methods.items():
        check_fit(runs[name], method)
    trained = [
        TrainedMethod(name, learns_from(method), {seed: router(runs[name], method, seed) for seed in seeds}, runs[name])
        for name, method in methods.items()
    ]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # What follows runs in the first process alone: a metric must not wait for the others.
        torch.distributed.destroy_process_group()
    return trained


def with_own_router(run: Run, name: str) -> Run:
    """The run with what one of the routers has of its own."""
    own = run.config.evaluation.router_settings.get(name)
    if not own:
        return run
    config = run.config.copy()
    config.router = OmegaConf.merge(config.router, own)
    return run.with_changes(config)


def _rows(run: Run, methods: Sequence[TrainedMethod]) -> list[Row]:
    settings = run.config.evaluation
    if settings.pruned_layers is not None:
        layers = sorted(set(settings.pruned_layers))
        return [ORIGINAL, Row(f"fixed-{len(layers)}", lambda query: layers, str(layers))]
    return [ORIGINAL, *baseline_rows(run), *router_rows(run, methods)]


def _under_other_adapters(
    run: Run, queries: Sequence[Query], originals: Sequence[Sample]
) -> Iterator[tuple[Row, list[Sample]]]:
    """Rows of static sets that are searched and run under other adapters than the run's."""
    settings = run.config.evaluation
    if settings.pruned_layers is not None or not settings.adapter_ablation.sizes:
        return
    for name, adapter in settings.adapter_ablation.adapters.items():
        config = run.config.copy()
        config.adapter, config.evaluation.static = adapter, settings.adapter_ablation.sizes
        for baseline in config.evaluation.baselines.values():
            if "sizes" in baseline:
                baseline.sizes = []
        other = run.with_changes(config)
        rows = [replace(row, name=f"{row.name}-{name}", curve=None, timed=False) for row in static_rows(other)]
        samples = run_rows(other, rows, Answers(other, queries, originals))
        yield from ((row, samples[row.name]) for row in rows)


def _time(run: Run, rows: Sequence[Row], queries: Sequence[Query], originals: Sequence[Sample]) -> list[Timing]:
    """Times all rows in turns; machine and hardware are part of the artifact's identity."""
    settings = run.config.evaluation.latency
    timed = queries[: settings.queries]
    if not timed:
        return []
    tokens = [max(1, min(settings.max_tokens, len(sample.token_ids) + 1)) for sample in originals[: len(timed)]]
    adapters_artifact = adapters(run)
    config = {
        "model": run.model_identity,
        "rows": {row.name: row.origin for row in rows},
        "latency": plain(settings),
        "tokens": tokens,
        "machine": describe_machine(),
        "versions": versions(),
        "device": run.config.hardware.device,
        "seed": run.config.seed,
    }
    upstream = upstream_of(adapters_artifact)

    def build(folder: Path) -> dict[str, Any]:
        target, pieces = folder / "timings.jsonl", Pieces(folder, "timings", ".jsonl")
        if not target.exists():
            measured = {json.loads(piece.splitlines()[0])["id"]: piece for piece in pieces.read()}
            left = [number for number, query in enumerate(timed) if query.id not in measured]
            with pruner_of(run, adapters_artifact) as pruner:
                results = time_rows(
                    run.slm,
                    pruner,
                    [timed[number] for number in left],
                    [run.tokens(timed[number])[0] for number in left],
                    [tokens[number] for number in left],
                    {row.name: timed_row(row) for row in rows},
                    settings.warmup,
                    run.config.seed,
                )
                tracked = track(results, "timing the rows in turns", len(left) * len(rows))
                for id, of_query in groupby(tracked, key=lambda timing: timing.id):
                    measured[id] = "".join(json.dumps(asdict(timing)) + "\n" for timing in of_query)
                    pieces.add(measured[id])
            with replacing(target) as path:
                path.write_text("".join(measured[query.id] for query in timed), encoding="utf-8")
        pieces.remove()
        return {"queries": len(timed), "rows": len(rows)}

    artifact = run.store.get_or_build("latency", VERSION, config, digest(timed), upstream, build, resumable=True)
    lines = (artifact.folder / "timings.jsonl").read_text(encoding="utf-8").splitlines()
    return [Timing(**json.loads(line)) for line in lines]
