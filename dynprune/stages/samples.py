"""Running the rows of the table on some queries; what each answered is an artifact.

Rows whose configurations are known are run together, query by query: what the configurations have in common is computed once.
Lossless rows are run one by one, each query for itself.
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from dynprune.artifacts import Artifact
from dynprune.atomic import Pieces, replacing
from dynprune.data.tasks import Query
from dynprune.evaluation.accuracy import Asked, Sample, run_queries
from dynprune.evaluation.lossless import run_lossless
from dynprune.metrics.scores import mean_scores
from dynprune.slm.pruning import configuration_mask
from dynprune.stages.adapters import adapters, pruner_of, upstream_of
from dynprune.stages.processes import check_job, shared_out
from dynprune.stages.progress import track
from dynprune.stages.rows import ORIGINAL, Row
from dynprune.stages.run import Run, digest

VERSION = 1
log = logging.getLogger(__name__)
_SAMPLES_A_PROCESS = 250


class Answers:
    """What the rows of one table have said so far, so that no row runs a query again under a configuration that was run.

    Attributes:
        queries: The queries of the table.
        drafts: By query id, outputs that may well come again, the likeliest first.
        known: The samples by query id and configuration.
        chosen: The rows' configurations, query by query, by the rows' names.
        shown: Names of rows and ids of queries whose samples the log has shown.
    """

    def __init__(self, run: Run, queries: Sequence[Query], originals: Sequence[Sample] = ()) -> None:
        """Starts without samples of pruned rows.

        Args:
            run: The run.
            queries: The queries.
            originals: What the unpruned SLM said to them, where it is known.
        """
        self.queries = queries
        self.drafts: dict[str, tuple[tuple[int, ...], ...]] = {query.id: (run.tokens(query)[1],) for query in queries}
        self.known: dict[tuple[str, tuple[int, ...]], Sample] = {}
        self.chosen: dict[str, list[tuple[int, ...]]] = {}
        self.shown: set[tuple[str, str]] = set()
        self.add(originals)

    def configurations(self, row: Row) -> list[tuple[int, ...]]:
        """What a row chooses for each query; it is asked once, since choosing may cost a pass of a router."""
        if row.name not in self.chosen:
            self.chosen[row.name] = [tuple(sorted(row.choose(query))) for query in self.queries]
        return self.chosen[row.name]

    def add(self, samples: Iterable[Sample]) -> None:
        """Takes on what the SLM said under the samples' configurations."""
        for sample in samples:
            self.known[sample.id, sample.pruned_layers] = sample
            if not sample.pruned_layers and sample.token_ids not in self.drafts[sample.id]:
                self.drafts[sample.id] = (sample.token_ids, *self.drafts[sample.id])


def run_rows(run: Run, rows: Sequence[Row], answers: Answers) -> dict[str, list[Sample]]:
    """Runs rows on all queries, or reads what they said before.

    Args:
        run: The run.
        rows: The rows.
        answers: What rows of the same table have said; the rows' samples are added.

    Returns:
        By row, a sample for each query, in their order.
    """
    samples: dict[str, list[Sample]] = {}
    # The unpruned SLM's answers are drafts for all others; what is there already need not be generated.
    original, others = (
        [row for row in rows if row.drafting is None and (row.origin == ORIGINAL.origin) == wanted] for wanted in (True, False)
    )
    lossless = [row for row in rows if row.drafting is not None]
    for group in (original, others):
        there = [row for row in group if run.store.holds(**_identity(run, row, answers.queries))]
        samples |= {row.name: _read_row(run, row, answers) for row in there}
        missing = [row for row in group if row.name not in samples]
        if missing:
            _generate(run, missing, answers)
            samples |= {row.name: _read_row(run, row, answers) for row in missing}
    samples |= {row.name: _read_row(run, row, answers) for row in lossless}
    return {row.name: samples[row.name] for row in rows}


def _identity(run: Run, row: Row, queries: Sequence[Query]) -> dict[str, Any]:
    """What identifies the artifact of a row."""
    config = {
        "model": run.model_identity,
        "origin": row.origin,
        "max_tokens_margin": run.config.evaluation.max_tokens_margin,
    }
    upstream = {} if row.origin == ORIGINAL.origin else upstream_of(adapters(run))
    return {"stage": "evaluate", "version": VERSION, "config": config, "data": digest(queries), "upstream": upstream}


def _read_row(run: Run, row: Row, answers: Answers) -> list[Sample]:
    """The samples of a row, from its artifact, which is made where it is missing."""

    def build(folder: Path) -> dict[str, Any]:
        samples = _answered(row, answers) if row.drafting is None else _run_lossless(run, row, answers, folder)
        write_samples(samples, folder / "samples.jsonl")
        means = mean_scores()
        means.update([sample.output for sample in samples], answers.queries)
        scores = {name: float(mean) for name, mean in means.compute().items()}
        _pieces(folder).remove()
        return {"queries": len(samples), "truncated": sum(sample.truncated for sample in samples), **scores}

    identity = _identity(run, row, answers.queries)
    artifact = run.store.get_or_build(**identity, build=build, resumable=True)
    samples = _parsed((artifact.folder / "samples.jsonl").read_text(encoding="utf-8"))
    for query, sample in zip(answers.queries, samples, strict=True):
        _show(run, row, query, sample, answers)
    if row.drafting is None:
        answers.add(samples)
    return samples


def _answered(row: Row, answers: Answers) -> list[Sample]:
    chosen = zip(answers.queries, answers.configurations(row), strict=True)
    return [answers.known[query.id, configuration] for query, configuration in chosen]


def _run_lossless(run: Run, row: Row, answers: Answers, folder: Path) -> list[Sample]:
    """Generates what a lossless row says; it goes on where it was stopped."""
    assert row.drafting is not None
    said = {sample.id: sample for sample in _read_pieces(folder)}
    chosen = zip(answers.queries, answers.configurations(row), strict=True)
    left = [(query, configuration) for query, configuration in chosen if query.id not in said]
    queries, configurations = [query for query, _ in left], [configuration for _, configuration in left]
    limit = run.max_new_tokens(answers.queries)
    pieces = _pieces(folder)
    with pruner_of(run, adapters(run)) as pruner:
        results = run_lossless(run.slm, pruner, queries, configurations, limit, row.drafting)
        tracked = track(results, f"evaluating {row.name}", len(left))
        for query, sample in zip(queries, tracked, strict=True):
            pieces.add(_lines([sample]))
            _show(run, row, query, sample, answers)
            said[sample.id] = sample
    return [said[query.id] for query in answers.queries]


def _generate(run: Run, rows: Sequence[Row], answers: Answers) -> None:
    """Generates what rows choose and nobody has said yet, all of it together; it goes on where it was stopped."""
    queries = answers.queries
    rows_of: dict[tuple[str, tuple[int, ...]], list[Row]] = {}
    for query, *configurations in zip(queries, *(answers.configurations(row) for row in rows), strict=True):
        for row, configuration in zip(rows, configurations, strict=True):
            rows_of.setdefault((query.id, configuration), []).append(row)
    query_of = {query.id: query for query in queries}
    identity = {**_identity(run, rows[0], queries), "stage": "generate"}
    upstream = identity["upstream"]
    identity["config"]["origin"] = hashlib.sha256(json.dumps(sorted(rows_of)).encode()).hexdigest()
    # Whatever was generated for other rows too, those of a run that was stopped included.
    for folder in run.store.differing_in("origin", **identity):
        # Gone where another process has just finished it, under its final name.
        with suppress(FileNotFoundError):
            answers.add(_read_pieces(folder))
    if all(key in answers.known for key in rows_of):
        return
    # Mistakes are said here, before anything is left behind.
    check_job(run)
    configuration_mask(run.slm, [layers for _, layers in rows_of])

    def build(folder: Path) -> dict[str, Any]:
        pieces = _pieces(folder)
        mine = _read_pieces(folder)
        answers.add(mine)
        kept = {(sample.id, sample.pruned_layers) for sample in mine}
        if known := [answers.known[key] for key in rows_of if key in answers.known and key not in kept]:
            pieces.add(_lines(known))
        left: dict[str, list[tuple[int, ...]]] = {}
        for id, layers in rows_of:
            if (id, layers) not in answers.known:
                left.setdefault(id, []).append(layers)
        count = sum(map(len, left.values()))
        asked = [Asked(query_of[id], tuple(configurations), answers.drafts[id]) for id, configurations in left.items()]
        job = partial(_generated, adapters(run) if upstream else None, run.max_new_tokens(queries))
        least = max(1, math.ceil(_SAMPLES_A_PROCESS * len(asked) / max(1, count)))
        what = rows[0].name if len(rows) == 1 else f"{len(rows)} rows"
        generated = 0
        with closing(shared_out(run, job, asked, least)) as results:
            tracked = track(results, f"evaluating {what}", count)
            while part := list(islice(tracked, run.config.hardware.batch_size)):
                pieces.add(_lines(part))
                generated += len(part)
                for sample in part:
                    for row in rows_of[sample.id, sample.pruned_layers]:
                        _show(run, row, query_of[sample.id], sample, answers)
        assert generated == count, "every configuration of every query gives a sample"
        return {"samples": len(rows_of), "generated": count}

    answers.add(_read_pieces(run.store.get_or_build(**identity, build=build, resumable=True).folder))


def _generated(
    artifact: Artifact | None, max_new_tokens: int, run: Run, asked: Sequence[Asked], shared_bytes: int
) -> Iterator[Sample]:
    with pruner_of(run, artifact) as pruner:
        yield from run_queries(run.slm, pruner, asked, max_new_tokens, run.config.hardware.batch_size, shared_bytes)


def write_samples(samples: Sequence[Sample], target: Path) -> None:
    """Writes samples, one JSON object a line."""
    with replacing(target) as path:
        path.write_text(_lines(samples), encoding="utf-8")


def _lines(samples: Sequence[Sample]) -> str:
    return "".join(json.dumps(asdict(sample)) + "\n" for sample in samples)


def _parsed(text: str) -> list[Sample]:
    records: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
    for record in records:
        record["pruned_layers"] = tuple(record["pruned_layers"])
        record["token_ids"] = tuple(record["token_ids"])
    return [Sample(**record) for record in records]


def _pieces(folder: Path) -> Pieces:
    return Pieces(folder, "samples", ".jsonl")


def _read_pieces(folder: Path) -> list[Sample]:
    return [sample for piece in _pieces(folder).read() for sample in _parsed(piece)]


def _show(run: Run, row: Row, query: Query, sample: Sample, answers: Answers) -> None:
    """Shows a sample of a row, once."""
    if run.config.evaluation.verbose and (row.name, query.id) not in answers.shown:
        answers.shown.add((row.name, query.id))
        log.info("%s", _verdict(row.name, query, sample))


def _verdict(row: str, query: Query, sample: Sample) -> str:
    asked = query.messages[-1]["content"]
    scores = ", ".join(f"{name} {value:g}" for name, value in sample.scores.items())
    return f"{row} | {query.id}: {asked}\n  pruned {list(sample.pruned_layers)}\n  says {sample.output}\n  {scores}"
