"""Preference pairs: of two configurations tried on the same query, which is the better one.

A beats B if its score is higher, or the scores are equal and it prunes more layers; otherwise there is no
pair. Instead of the score the likelihood of the reference answer may decide, as log-likelihood in nats a
token: it compares configurations that were only estimated too, and tells two failures apart. Scores that
differ by no more than a margin count as equal. On disk: one parquet file with the thesis's columns id,
winner_pruned_layers, loser_pruned_layers, winner_score, loser_score, the pairs of a query one after another,
and in the metadata the header of the rollouts, its score named ``log_likelihood`` where that decided.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from dynprune.atomic import replacing
from dynprune.data.parquet import open_parquet, with_header
from dynprune.data.rollouts import Tried, by_query, read_header, read_likelihoods, read_rollouts

PAIR_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("winner_pruned_layers", pa.list_(pa.int32()), nullable=False),
        pa.field("loser_pruned_layers", pa.list_(pa.int32()), nullable=False),
        pa.field("winner_score", pa.float64(), nullable=False),
        pa.field("loser_score", pa.float64(), nullable=False),
    ]
)
LOG_LIKELIHOOD = "log_likelihood"
# Small enough that a shuffle buffer spans many row groups, and so many queries.
_ROWS_PER_GROUP = 1024


@dataclass(frozen=True)
class PreferencePair:
    """Two configurations tried on one query, the better one first.

    Attributes:
        id: The query's id.
        winner_pruned_layers: The better configuration, in ascending order.
        loser_pruned_layers: The other one, in ascending order.
        winner_score: Score of the better one, or its log-likelihood where that decided.
        loser_score: The same of the other one.
    """

    id: str
    winner_pruned_layers: tuple[int, ...]
    loser_pruned_layers: tuple[int, ...]
    winner_score: float
    loser_score: float


@dataclass(frozen=True)
class PairCounts:
    """What `write_pairs` read and wrote.

    Attributes:
        queries: Queries with rollouts.
        queries_with_pairs: Queries among them that gave a pair.
        rollouts: Rollouts, or likelihoods, read.
        pairs: Pairs written.
    """

    queries: int
    queries_with_pairs: int
    rollouts: int
    pairs: int


def prefers(a: Tried, b: Tried, margin: float = 0.0) -> bool:
    """Tell whether a beats b: a score higher by more than the margin, or one within the margin and more layers pruned."""
    better = a.score - b.score
    return better > margin or (abs(better) <= margin and len(a.pruned_layers) > len(b.pruned_layers))


def all_pairs(
    rollouts: Sequence[Tried], min_winner_score: float | None = None, margin: float = 0.0, equal_sizes: bool = False
) -> Iterator[PreferencePair]:
    """Pair each two rollouts, or likelihoods, of which one beats the other.

    Args:
        rollouts: All rollouts, or all likelihoods, of one query.
        min_winner_score: Leave out pairs whose winner scores less; ``None`` leaves out none.
        margin: Scores that differ by no more than this count as equal.
        equal_sizes: Leave out pairs that prune different numbers of layers: what is left says which layers, not how many.
    """
    for a, b in itertools.combinations(rollouts, 2):
        if equal_sizes and len(a.pruned_layers) != len(b.pruned_layers):
            continue
        winner, loser = (a, b) if prefers(a, b, margin) else (b, a)
        if prefers(winner, loser, margin) and (min_winner_score is None or winner.score >= min_winner_score):
            yield PreferencePair(winner.id, winner.pruned_layers, loser.pruned_layers, winner.score, loser.score)


def random_pairs(
    rollouts: Sequence[Tried],
    count: int,
    rng: random.Random,
    min_winner_score: float | None = None,
    margin: float = 0.0,
    equal_sizes: bool = False,
) -> list[PreferencePair]:
    """Draw some of `all_pairs`, uniformly and each at most once.

    Args:
        rollouts: All rollouts, or all likelihoods, of one query.
        count: How many; all there are where they are fewer.
        rng: Draws them.
        min_winner_score: As for `all_pairs`.
        margin: As for `all_pairs`.
        equal_sizes: As for `all_pairs`.
    """
    pairs = list(all_pairs(rollouts, min_winner_score, margin, equal_sizes))
    return rng.sample(pairs, min(count, len(pairs)))


def write_pairs(
    rollouts: Path,
    path: Path,
    strategy: Literal["all", "random"],
    count: int | None,
    seed: int,
    min_winner_score: float | None = None,
    prefer_by: Literal["score", "likelihood"] = "score",
    margin: float = 0.0,
    equal_sizes: bool = False,
) -> PairCounts:
    """Turn the rollouts of each query into preference pairs, a query at a time.

    Args:
        rollouts: The folder of the rollouts.
        path: The parquet file to write; it appears when it is complete.
        strategy: ``all`` for every pair of a query, ``random`` for some.
        count: Pairs of a query for ``random``, else ``None``.
        seed: Seed of the draws; those of a query depend on it and on the query's id alone.
        min_winner_score: As for `all_pairs`.
        prefer_by: What decides: the score, or the likelihood of the reference answer.
        margin: As for `all_pairs`.
        equal_sizes: As for `all_pairs`.

    Raises:
        ValueError: The strategy is unknown or does not go with the count, what decides is unknown or the margin
            negative, the rollouts cannot be read, or no query gives a pair.
    """
    _check_settings(strategy, count, min_winner_score, prefer_by, margin)
    header = read_header(rollouts)
    if prefer_by == "likelihood":
        header = replace(header, score=LOG_LIKELIHOOD)
    groups: Iterator[Sequence[Tried]] = (
        by_query(read_rollouts(rollouts)) if prefer_by == "score" else by_query(read_likelihoods(rollouts))
    )
    queries = queries_with_pairs = rollouts_read = pairs_written = 0
    with replacing(path) as temporary, _PairSink(temporary, with_header(PAIR_SCHEMA, header)) as sink:
        for group in groups:
            if count is None:
                pairs = list(all_pairs(group, min_winner_score, margin, equal_sizes))
            else:
                rng = random.Random(f"{seed}-{group[0].id}")
                pairs = random_pairs(group, count, rng, min_winner_score, margin, equal_sizes)
            sink.write(pairs)
            queries += 1
            queries_with_pairs += bool(pairs)
            rollouts_read += len(group)
            pairs_written += len(pairs)
        if not pairs_written:
            raise ValueError(_why_no_pairs(rollouts, queries, min_winner_score, equal_sizes))
    return PairCounts(queries, queries_with_pairs, rollouts_read, pairs_written)


def _check_settings(strategy: str, count: int | None, min_winner_score: float | None, prefer_by: str, margin: float) -> None:
    if strategy not in ("all", "random"):
        raise ValueError(f"pairs.strategy={strategy!r} is unknown; allowed: all, random")
    if strategy == "random" and (count is None or count < 1):
        raise ValueError(f"pairs.count={count} does not go with pairs.strategy=random; allowed: at least 1")
    if strategy == "all" and count is not None:
        raise ValueError(f"pairs.count={count} does not go with pairs.strategy=all; allowed: null")

    if prefer_by not in ("score", "likelihood"):
        raise ValueError(f"pairs.prefer_by={prefer_by!r} is unknown; allowed: score, likelihood")
    if not margin >= 0:
        raise ValueError(f"pairs.margin={margin} is negative; allowed: 0 or more")

    if prefer_by == "likelihood" and min_winner_score is not None and min_winner_score >= 0:
        raise ValueError(
            f"pairs.min_winner_score={min_winner_score} leaves out all pairs of pairs.prefer_by=likelihood, whose scores are "
            "log-likelihoods below 0; type pairs.min_winner_score=null"
        )


def _why_no_pairs(rollouts: Path, queries: int, min_winner_score: float | None, equal_sizes: bool) -> str:
    if not queries:
        return f"no configuration in {rollouts} has a likelihood; type exploration.estimate_all=true, or pairs.prefer_by=score"
    too_low = "" if min_winner_score is None else f", or score less than pairs.min_winner_score={min_winner_score}"
    alike = "of equal size do not differ in score (pairs.equal_sizes=true)" if equal_sizes else "do not differ in score or size"
    return (
        f"none of the {queries} queries in {rollouts} gives a preference pair: their configurations "
        f"{alike}{too_low}; explore more configurations or queries"
    )


def read_pairs(path: Path, batch_size: int = 1024) -> Iterator[PreferencePair]:
    """Read the pairs of a file, some rows at a time.

    Args:
        path: A file that `write_pairs` wrote.
        batch_size: Rows in memory.

    Raises:
        ValueError: It is missing, broken or not a file of pairs.
    """
    with open_parquet(path, PAIR_SCHEMA) as file:
        for batch in file.iter_batches(batch_size=batch_size):
            for row in batch.to_pylist():
                yield PreferencePair(
                    row["id"],
                    tuple(row["winner_pruned_layers"]),
                    tuple(row["loser_pruned_layers"]),
                    row["winner_score"],
                    row["loser_score"],
                )


class _PairSink:
    """Writes pairs to a file, as row groups of equal size."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema = schema
        self._writer = pq.ParquetWriter(path, schema, write_page_checksum=True)
        self._waiting: list[PreferencePair] = []

    def __enter__(self) -> "_PairSink":
        return self

    def __exit__(self, *exception: object) -> None:
        self._flush(self._waiting)
        self._writer.close()

    def write(self, pairs: Sequence[PreferencePair]) -> None:
        self._waiting += pairs
        while len(self._waiting) >= _ROWS_PER_GROUP:
            self._flush(self._waiting[:_ROWS_PER_GROUP])
            self._waiting = self._waiting[_ROWS_PER_GROUP:]

    def _flush(self, pairs: Sequence[PreferencePair]) -> None:
        if pairs:
            self._writer.write_table(pa.Table.from_pylist([vars(pair) for pair in pairs], schema=self._schema))
