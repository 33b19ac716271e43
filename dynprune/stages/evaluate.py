"""The stage ``evaluate``: runs the rows of the table on the test split, and times them against each other."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from dynprune.artifacts import Artifact
from dynprune.atomic import replacing
from dynprune.data.rollouts import completed_ids
from dynprune.data.tasks import Query
from dynprune.evaluation.accuracy import Sample, run_queries
from dynprune.evaluation.latency import Chooser, Timing, time_rows
from dynprune.evaluation.machine import describe_machine, versions
from dynprune.evaluation.risk_control import fewest_queries, last_controlled
from dynprune.evaluation.static_search import greedy_static_sets
from dynprune.metrics.scores import mean_scores
from dynprune.router.budget import bonus_for_mean, same_count, with_bonus
from dynprune.slm.prompt_states import PromptStates
from dynprune.stages.adapters import adapters, pruner_of
from dynprune.stages.explore import explore
from dynprune.stages.progress import track
from dynprune.stages.router import TrainedRouter, router, router_layers, trained_router
from dynprune.stages.run import Run, digest, once_a_run, plain

VERSION = 1
log = logging.getLogger(__name__)
# The score that says whether an answer is right, for the guarantee.
_RIGHT_BY = "ast_match"


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: Its name.
        choose: What gives the configuration for a query.
        origin: The fingerprint, or the layers, that the configurations come from.
        router_layers: What choosing costs, in layers of the SLM.
    """

    name: str
    choose: Chooser
    origin: str
    router_layers: float = 0.0


_ORIGINAL = Row("original", lambda query: (), "[]")


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` gives to the report."""

    queries: list[Query]
    rows: list[Row]
    samples: dict[str, list[Sample]]
    timings: list[Timing]


def evaluate(run: Run) -> Evaluation:
    """Runs all rows of the configuration."""
    queries = run.queries("test", run.config.evaluation.max_queries, "evaluation.max_queries")
    rows = _rows(run)
    samples: dict[str, list[Sample]] = {}
    drafts: Mapping[str, tuple[int, ...]] = {}
    # Two rows share what a prompt is below the first layer in which their configurations differ.
    states = PromptStates(run.shared_bytes)
    for row in rows:
        samples[row.name] = _run_row(run, row, queries, drafts, states)
        if row.name == "original":
            drafts = {s.id: s.token_ids for s in samples[row.name]}
    del states
    return Evaluation(queries, rows, samples, _time(run, rows, queries, samples["original"]))


@once_a_run
def static_sets(run: Run) -> Artifact:
    """Searches the static sets up to the largest size that the table asks for."""
    settings = run.config.evaluation
    queries = run.queries("train", settings.static_samples, "evaluation.static_samples")
    adapters_artifact = adapters(run)
    config = {
        "model": run.model_identity,
        "largest": max(settings.static),
        "candidates": settings.static_candidates,
    }
    upstream = {"adapters": adapters_artifact.fingerprint if adapters_artifact else "none"}

    def build(folder: Path) -> dict[str, Any]:
        samples = [run.tokens(query) for query in queries]
        # Batches of similar answers: the head runs on as many tokens of each sample as the longest answer has.
        samples.sort(key=lambda sample: len(sample[1]))
        with pruner_of(run, adapters_artifact) as pruner:
            search = greedy_static_sets(
                run.slm,
                pruner,
                samples,
                max(settings.static),
                settings.static_candidates,
                run.config.hardware.batch_size,
            )
            found = list(track(search, "searching static sets", max(settings.static)))
        sets = {str(len(layers)): {"layers": list(layers), "nats_per_token": loss} for layers, loss in found}
        with replacing(folder / "sets.json") as path:
            path.write_text(json.dumps(sets, indent=2), encoding="utf-8")
        return {"sets": len(sets), "queries": len(queries)}

    return run.store.get_or_build("static", VERSION, config, digest(queries), upstream, build, resumable=False)


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
    rows = [_ORIGINAL]
    if settings.pruned_layers is not None:
        layers = sorted(set(settings.pruned_layers))
        return [*rows, Row(f"fixed-{len(layers)}", lambda query: layers, str(layers))]
    if settings.static:
        sets = json.loads((static_sets(run).folder / "sets.json").read_text(encoding="utf-8"))
        for size in settings.static:
            layers = sets[str(size)]["layers"]
            rows.append(Row(f"static-{size}", _always(layers), str(layers)))
    for name, artifact in train_routers(run).items():
        rows += _router_rows(run, f"router-{name}", artifact)
    return rows


def _router_rows(run: Run, name: str, artifact: Artifact) -> list[Row]:
    """A router's own row, one for each budget, and that of the largest budget that is safe."""
    settings = run.config.evaluation
    trained = trained_router(run, artifact)
    own = Row(name, trained.chooser(), artifact.fingerprint, router_layers(run))
    budgets = [_budget_row(run, own, trained, budget) for budget in sorted(settings.budgets)]
    if settings.guarantee is None:
        return [own, *budgets]
    if not budgets:
        raise ValueError("evaluation.guarantee needs budgets to choose from; set evaluation.budgets, for example [0,0.1,0.2]")
    safe = last_controlled(_lost(run, budgets), settings.guarantee.loss, settings.guarantee.confidence)
    log.info("%s: the largest safe budget is that of %s", name, safe.name if safe else "no row, so the full SLM runs")
    return [own, *budgets, replace(safe or _ORIGINAL, name=f"{name}@safe")]


def _budget_row(run: Run, own: Row, trained: TrainedRouter, budget: float) -> Row:
    """The row of a router that is told which nominal speedup to reach."""
    layers = budget * run.slm.num_layers + own.router_layers
    if not 0 <= layers <= trained.policy.k_max:
        raise ValueError(
            f"evaluation.budgets: a nominal speedup of {budget:g} needs {layers:g} pruned layers, the router's cost included, "
            f"but {own.name} prunes 0 to {trained.policy.k_max}; lower the budget, or raise router.k_max"
        )
    rule = run.config.evaluation.budget_rule
    if rule == "same":
        k = round(layers)
        count, told = same_count(k), f"k={k}"
    elif rule == "mean":
        explored, _ = _validation_queries(run)
        bonus = bonus_for_mean(torch.cat([trained.policy.log_p_count(trained.outputs(query)) for query in explored]), layers)
        count, told = with_bonus(bonus), f"bonus={bonus!r}"
    else:
        raise ValueError(f"evaluation.budget_rule={rule!r} is unknown; allowed: same, mean")
    return replace(own, name=f"{own.name}@{budget:g}", choose=trained.chooser(count), origin=f"{own.origin} {told}")


def _lost(run: Run, rows: Sequence[Row]) -> Iterator[tuple[Row, list[bool]]]:
    """Which held-back queries the full SLM gets right and a row wrong; a row is run when it is asked for."""
    _, held_back = _validation_queries(run)
    settings = run.config.evaluation.guarantee
    if len(held_back) < (fewest := fewest_queries(settings.loss, settings.confidence)):
        raise ValueError(
            f"evaluation.guarantee: a loss of {settings.loss} with confidence {settings.confidence} can be guaranteed by "
            f"{fewest} validation queries at least, but only {len(held_back)} are left that the router's training did not see; "
            "lower exploration.max_validation_queries, raise data.splits.validation, or allow a larger loss"
        )
    states = PromptStates(run.shared_bytes)
    originals = _run_row(run, _ORIGINAL, held_back, {}, states)
    drafts = {sample.id: sample.token_ids for sample in originals}
    for row in rows:
        samples = _run_row(run, row, held_back, drafts, states)
        pairs = zip(originals, samples, strict=True)
        yield row, [full.scores[_RIGHT_BY] == 1 and pruned.scores[_RIGHT_BY] < 1 for full, pruned in pairs]


def _validation_queries(run: Run) -> tuple[list[Query], list[Query]]:
    """The explored validation queries, and the others: those have chosen checkpoints, so a guarantee must not rest on them."""
    explored = completed_ids(explore(run, "validation").folder)
    queries = run.queries("validation", None, "evaluation.guarantee")
    return [query for query in queries if query.id in explored], [query for query in queries if query.id not in explored]


def _always(layers: Sequence[int]) -> Callable[[Query], Sequence[int]]:
    return lambda query: layers


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
    if row.origin == _ORIGINAL.origin:
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
        with pruner_of(run, adapters_artifact) as pruner:
            results = run_queries(
                run.slm, pruner, queries, configurations, drafts or references, limit, run.config.hardware.batch_size, states
            )
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
                {row.name: row.choose for row in rows},
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
