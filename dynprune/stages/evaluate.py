"""The stage ``evaluate``: runs the rows of the table on the test split, and times them against each other."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from dynprune.artifacts import Artifact
from dynprune.atomic import replacing
from dynprune.data.tasks import Query
from dynprune.evaluation.accuracy import Sample, run_queries
from dynprune.evaluation.latency import Timing, time_rows
from dynprune.evaluation.lossless import count_near_ties, run_lossless
from dynprune.evaluation.machine import describe_machine, versions
from dynprune.metrics.scores import mean_scores
from dynprune.slm.prompt_states import PromptStates
from dynprune.slm.pruning import LayerPruner
from dynprune.stages.adapters import adapters, pruner_of
from dynprune.stages.baselines import baseline_rows
from dynprune.stages.lossless import lossless_rows, timed_row
from dynprune.stages.progress import track
from dynprune.stages.router import chooser, router
from dynprune.stages.rows import Row
from dynprune.stages.run import Run, digest, plain

VERSION = 1
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` gives to the report.

    Attributes:
        queries: The test queries.
        rows: The rows of the table, the original first.
        samples: By row, a sample for each query.
        timings: A timing for each row and timed query.
        near_ties: By lossless row, how many outputs differ from the original by rounding.
    """

    queries: list[Query]
    rows: list[Row]
    samples: dict[str, list[Sample]]
    timings: list[Timing]
    near_ties: dict[str, int]


def evaluate(run: Run) -> Evaluation:
    """Runs all rows of the configuration."""
    queries = run.queries("test", run.config.evaluation.max_queries, "evaluation.max_queries")
    rows = _rows(run)
    rows += lossless_rows(run, rows)
    samples: dict[str, list[Sample]] = {}
    near_ties: dict[str, int] = {}
    drafts: Mapping[str, tuple[int, ...]] = {}
    # Two rows share what a prompt is below the first layer in which their configurations differ.
    states = PromptStates(run.shared_bytes)
    for row in rows:
        samples[row.name] = _run_row(run, row, queries, drafts, states)
        if row.name == "original":
            drafts = {s.id: s.token_ids for s in samples[row.name]}
        if row.drafting is not None:
            with LayerPruner(run.slm) as pruner:
                near_ties[row.name] = count_near_ties(run.slm, pruner, queries, samples[row.name], samples["original"])
    del states
    return Evaluation(queries, rows, samples, _time(run, rows, queries, samples["original"]), near_ties)


def train_routers(run: Run) -> dict[str, Artifact]:
    """The routers that the table compares, by name; trained where they are missing."""
    if run.config.evaluation.pruned_layers is not None:
        return {}
    methods: Mapping[str, DictConfig] = run.config.evaluation.routers or {run.config.method.name: run.config.method}
    routers = {name: router(run, method) for name, method in methods.items()}
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # What follows runs in the first process alone: a metric must not wait for the others.
        torch.distributed.destroy_process_group()
    return routers


def _rows(run: Run) -> list[Row]:
    settings = run.config.evaluation
    rows = [Row("original", lambda query: (), "[]", uses_router=False)]
    if settings.pruned_layers is not None:
        layers = sorted(set(settings.pruned_layers))
        return [*rows, Row(f"fixed-{len(layers)}", lambda query: layers, str(layers), uses_router=False)]
    rows += baseline_rows(run)
    for name, artifact in train_routers(run).items():
        rows.append(Row(f"router-{name}", chooser(run, artifact), artifact.fingerprint, uses_router=True))
    return rows


def _run_row(
    run: Run, row: Row, queries: Sequence[Query], drafts: Mapping[str, tuple[int, ...]], states: PromptStates
) -> list[Sample]:
    adapters_artifact = adapters(run)
    config = {
        "model": run.model_identity,
        "origin": row.origin,
        "max_tokens_margin": run.config.evaluation.max_tokens_margin,
    }
    upstream = {"adapters": adapters_artifact.fingerprint if adapters_artifact else "none"}
    if row.name == "original":
        # Without pruning there is nothing that adapters could change.
        adapters_artifact, upstream = None, {}
    position_of = {query.id: position for position, query in enumerate(queries)}
    shown: set[str] = set()

    def show(sample: Sample) -> None:
        if run.config.evaluation.verbose and sample.id not in shown:
            log.info("%s", _verdict(row.name, queries[position_of[sample.id]], sample))
            shown.add(sample.id)

    def build(folder: Path) -> dict[str, Any]:
        configurations = [tuple(row.choose(query)) for query in queries]
        # The first row has no outputs to draft from but the reference answers, which it often repeats.
        references = {query.id: run.tokens(query)[1] for query in queries}
        limit = run.max_new_tokens(queries)
        samples = []
        batch = run.config.hardware.batch_size
        with pruner_of(run, adapters_artifact) as pruner:
            if row.drafting is None:
                likely = drafts or references
                results = run_queries(run.slm, pruner, queries, configurations, likely, limit, batch, states)
            else:
                results = run_lossless(run.slm, pruner, queries, configurations, limit, row.drafting)
            for sample in track(results, f"evaluating {row.name}", len(queries)):
                samples.append(sample)
                show(sample)
        samples.sort(key=lambda sample: position_of[sample.id])
        write_samples(samples, folder / "samples.jsonl")
        means = mean_scores()
        means.update([sample.output for sample in samples], queries)
        scores = {name: float(mean) for name, mean in means.compute().items()}
        return {"queries": len(samples), "truncated": sum(sample.truncated for sample in samples), **scores}

    artifact = run.store.get_or_build("evaluate", VERSION, config, digest(queries), upstream, build, resumable=False)
    samples = _read_samples(artifact.folder)
    for sample in samples:
        show(sample)
    return samples


def write_samples(samples: Sequence[Sample], target: Path) -> None:
    """Writes samples, one JSON object a line."""
    with replacing(target) as path:
        path.write_text("".join(json.dumps(asdict(sample)) + "\n" for sample in samples), encoding="utf-8")


def _read_samples(folder: Path) -> list[Sample]:
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    records: list[dict[str, Any]] = [json.loads(line) for line in lines]
    for record in records:
        record["pruned_layers"] = tuple(record["pruned_layers"])
        record["token_ids"] = tuple(record["token_ids"])
    return [Sample(**record) for record in records]


def _verdict(row: str, query: Query, sample: Sample) -> str:
    asked = query.messages[-1]["content"]
    scores = ", ".join(f"{name} {value:g}" for name, value in sample.scores.items())
    return f"{row} | {query.id}: {asked}\n  pruned {list(sample.pruned_layers)}\n  says {sample.output}\n  {scores}"


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
    upstream = {"adapters": adapters_artifact.fingerprint if adapters_artifact else "none"}

    def build(folder: Path) -> dict[str, Any]:
        prompts = [run.tokens(query)[0] for query in timed]
        with pruner_of(run, adapters_artifact) as pruner:
            results = time_rows(
                run.slm,
                pruner,
                timed,
                prompts,
                tokens,
                {row.name: timed_row(row) for row in rows},
                settings.warmup,
                run.config.seed,
            )
            timings = list(track(results, "timing the rows in turns", len(timed) * len(rows)))
        with replacing(folder / "timings.jsonl") as path:
            path.write_text("".join(json.dumps(asdict(t)) + "\n" for t in timings), encoding="utf-8")
        return {"queries": len(timed), "rows": len(rows)}

    artifact = run.store.get_or_build("latency", VERSION, config, digest(timed), upstream, build, resumable=False)
    lines = (artifact.folder / "timings.jsonl").read_text(encoding="utf-8").splitlines()
    return [Timing(**json.loads(line)) for line in lines]
