"""Running a row of the table on some queries; what it answered is an artifact."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dynprune.artifacts import Artifact
from dynprune.atomic import replacing
from dynprune.data.tasks import Query
from dynprune.evaluation.accuracy import Sample, run_queries
from dynprune.evaluation.lossless import run_lossless
from dynprune.metrics.scores import mean_scores
from dynprune.slm.prompt_states import PromptStates
from dynprune.stages.adapters import adapters, pruner_of, upstream_of
from dynprune.stages.progress import track
from dynprune.stages.rows import ORIGINAL, Row
from dynprune.stages.run import Run, digest

VERSION = 1
log = logging.getLogger(__name__)


class Answers:
    """What the rows of one table have said so far, so that no row runs a query again under a configuration that was run.

    Attributes:
        queries: The queries of the table.
        drafts: By query id, an output that may well come again: that of the unpruned SLM, or the reference answer before it.
        states: What prompts are below the first layer in which two rows' configurations differ.
        known: The samples by query id and configuration.
    """

    def __init__(self, run: Run, queries: Sequence[Query]) -> None:
        """Starts without samples."""
        self.queries = queries
        self.drafts: Mapping[str, tuple[int, ...]] = {query.id: run.tokens(query)[1] for query in queries}
        self.states = PromptStates(run.shared_bytes, len(queries))
        self.known: dict[tuple[str, tuple[int, ...]], Sample] = {}


def run_row(run: Run, row: Row, answers: Answers) -> list[Sample]:
    """Runs a row on all queries, or reads what it said before.

    Args:
        run: The run.
        row: The row.
        answers: What rows of the same table have said; the row's samples are added.

    Returns:
        A sample for each query, in their order.
    """
    queries = answers.queries
    adapters_artifact = adapters(run)
    config = {
        "model": run.model_identity,
        "origin": row.origin,
        "max_tokens_margin": run.config.evaluation.max_tokens_margin,
    }
    upstream = upstream_of(adapters_artifact)
    if row.origin == ORIGINAL.origin:
        # Without pruning there is nothing that adapters could change.
        adapters_artifact, upstream = None, {}
    position_of = {query.id: position for position, query in enumerate(queries)}
    shown: set[str] = set()

    def show(sample: Sample) -> None:
        if run.config.evaluation.verbose and sample.id not in shown:
            log.info("%s", _verdict(row.name, queries[position_of[sample.id]], sample))
            shown.add(sample.id)

    def build(folder: Path) -> dict[str, Any]:
        samples = []
        for sample in _run(run, row, answers, adapters_artifact):
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
    if row.drafting is None:
        answers.known |= {(sample.id, sample.pruned_layers): sample for sample in samples}
    if row.origin == ORIGINAL.origin:
        answers.drafts = {sample.id: sample.token_ids for sample in samples}
    return samples


def _run(run: Run, row: Row, answers: Answers, adapters_artifact: Artifact | None) -> Iterator[Sample]:
    """The samples of a row: first those that another row has already, then the others as they come."""
    configurations = [tuple(sorted(row.choose(query))) for query in answers.queries]
    limit = run.max_new_tokens(answers.queries)
    # A lossless row's answers under a configuration are not that configuration's.
    known = answers.known if row.drafting is None else {}
    left: list[tuple[Query, tuple[int, ...]]] = []
    for query, layers in zip(answers.queries, configurations, strict=True):
        if (query.id, layers) in known:
            yield known[query.id, layers]
        else:
            left.append((query, layers))
    new, layers_of_new = [query for query, _ in left], [layers for _, layers in left]
    with pruner_of(run, adapters_artifact) as pruner:
        if row.drafting is None:
            batch = run.config.hardware.batch_size
            results = run_queries(run.slm, pruner, new, layers_of_new, answers.drafts, limit, batch, answers.states)
        else:
            results = run_lossless(run.slm, pruner, new, layers_of_new, limit, row.drafting)
        yield from track(results, f"evaluating {row.name}", len(new))


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
