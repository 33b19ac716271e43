"""Rollouts on disk: parquet shards that are appended as the queries' searches end, and a journal of the searches in flight.

A shard holds all rollouts of some queries, a query's rows one after another, and it is there as a whole or
not at all. So a query is complete or absent. What searches in flight have found stands in the journal, so a
run that is killed loses no more than what it was about to find.
Columns, as in the thesis: id, pruned_layers, score, output; whether the output was cut; and nats_per_token,
null where the dense reward was not asked for. A configuration that was only estimated has a row as well,
without score, output and cut: there are many more of these, and a likelihood is worth learning from as much
as a score. `read_rollouts` leaves them out, so that a score is always one; `read_likelihoods` reads every row
that has a dense reward. The number of layers and the score's name stand in each file's metadata.
"""

import itertools
import json
import logging
import math
import shutil
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from dynprune.atomic import remove_leftovers, replacing
from dynprune.data.parquet import Header, header_of, open_parquet, with_header

log = logging.getLogger(__name__)
_SHARDS = "rollouts-*.parquet"
_JOURNAL = "in-flight.jsonl"
_CHECKSUM = "crc32"
_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("pruned_layers", pa.list_(pa.int32()), nullable=False),
        pa.field("score", pa.float64()),
        pa.field("output", pa.string()),
        pa.field("cut", pa.bool_()),
        pa.field("nats_per_token", pa.float64()),
    ]
)
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Rollout:
    """One configuration tried on one query.

    Attributes:
        id: The query's id.
        pruned_layers: The configuration, in ascending order.
        score: The output's score.
        output: What the pruned SLM answered.
        cut: Whether the output was cut because its score was certain already.
        nats_per_token: Negative log-likelihood of the reference answer, in nats a token; ``None`` where it was not estimated.
    """

    id: str
    pruned_layers: tuple[int, ...]
    score: float
    output: str
    cut: bool = False
    nats_per_token: float | None = None


@dataclass(frozen=True)
class Likelihood:
    """How likely the SLM finds the reference answer of one query under one configuration.

    Attributes:
        id: The query's id.
        pruned_layers: The configuration, in ascending order.
        nats_per_token: Negative log-likelihood of the reference answer, in nats a token.
    """

    id: str
    pruned_layers: tuple[int, ...]
    nats_per_token: float

    @property
    def score(self) -> float:
        """The log-likelihood, in nats a token: more is better, as for the score of a rollout."""
        return -self.nats_per_token


# What a search finds out about one configuration.
Tried = Rollout | Likelihood
OneKind = TypeVar("OneKind", Rollout, Likelihood)


class RolloutWriter:
    """Appends rollouts to a folder. One writer at a time; the artifact's lock sees to it.

    Attributes:
        completed_ids: The queries whose rollouts are on the disk.
    """

    def __init__(self, folder: Path, num_layers: int, score: str) -> None:
        """Open the folder, and remove what a writer that was killed left half-written.

        Args:
            folder: The folder; created where it is missing.
            num_layers: L, the SLM's decoder layers.
            score: Name of the score.

        Raises:
            ValueError: A shard is broken, is about another number of layers or another score, or holds
                queries that another shard holds as well.
        """
        self._folder = folder
        self._header = Header(num_layers, score)
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        paths = _shards(folder)
        for path in paths:
            with open_parquet(path, _SCHEMA) as file:
                _check_header(path, header_of(file), self._header)
        self.completed_ids = completed_ids(folder)
        self._next = 1 + int(paths[-1].stem.rpartition("-")[2]) if paths else 0

    def append(self, rollouts: Sequence[Tried], place: int | None = None) -> None:
        """Write one shard; when this returns, it is on the disk.

        Args:
            rollouts: All rollouts of some queries, and the likelihoods of configurations that were only estimated, each
                query's one after another; none writes nothing.
            place: Where the shard stands among all, so that their order does not depend on which query ends first; ``None``
                puts it behind the last.

        Raises:
            ValueError: A query is in the folder already or comes twice, or a rollout is malformed; nothing
                is written then.
        """
        if not rollouts:
            return
        ids = [query_id for query_id, _ in itertools.groupby(rollouts, key=lambda rollout: rollout.id)]
        if again := self.completed_ids.intersection(ids):
            raise ValueError(
                f"query {min(again)!r} has rollouts in {self._folder} already; append all rollouts of a query at once"
            )
        if len(set(ids)) < len(ids):
            apart = Counter(ids).most_common(1)[0][0]
            raise ValueError(f"the rollouts of query {apart!r} must be appended one after another")
        for rollout in rollouts:
            _check_rollout(rollout, self._header.num_layers)
        number = self._next if place is None else place
        path = self._folder / _SHARDS.replace("*", f"{number:06d}")
        if path.exists():
            raise ValueError(f"another process writes into {self._folder} at the same time; stop one of them")
        table = pa.Table.from_pylist([vars(rollout) for rollout in rollouts], schema=with_header(_SCHEMA, self._header))
        with replacing(path) as temporary:
            pq.write_table(table, temporary, write_page_checksum=True)
        self._next = max(self._next, number + 1)
        self.completed_ids.update(ids)


class Journal:
    """What the searches in flight have found, a JSON object with its checksum a line, for the attempt after this one.

    Attributes:
        found: What an earlier attempt found for queries that are not complete, in the order in which it came.
    """

    def __init__(self, folder: Path, completed_ids: Collection[str]) -> None:
        """Read what is there, and write it anew without what is complete and without what is broken.

        Args:
            folder: A folder that `RolloutWriter` writes.
            completed_ids: The queries whose rollouts are in its shards.
        """
        self._path = folder / _JOURNAL
        read = list(_read_journal(self._path)) if self._path.exists() else []
        self.found: list[Tried] = [one for one in read if one.id not in completed_ids]
        with replacing(self._path, appended=True) as path:
            path.write_text("".join(map(_line, self.found)), encoding="utf-8")

    def append(self, tried: Iterable[Tried]) -> None:
        """Write down what a search in flight has found."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(map(_line, tried)))

    def remove(self) -> None:
        """Take the journal away; the searches have all ended."""
        self._path.unlink()


def _line(tried: Tried) -> str:
    record = asdict(tried)
    return json.dumps({**record, _CHECKSUM: _checksum(record)}) + "\n"


def _checksum(record: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(record).encode())


def _read_journal(path: Path) -> Iterator[Tried]:
    """The entries up to the first line that is none: a kill tears the last one, a power cut may have spoilt more."""
    # By newlines alone: a text's own separators of lines are no ends of an entry.
    for number, line in enumerate(path.read_bytes().decode(errors="replace").split("\n"), start=1):
        if not line:
            return
        try:
            record = json.loads(line)
            if record.pop(_CHECKSUM) != _checksum(record):
                raise ValueError("the line is not what was written")
            record["pruned_layers"] = tuple(record["pruned_layers"])
            yield Rollout(**record) if "score" in record else Likelihood(**record)
        except (ValueError, KeyError, AttributeError, TypeError):
            log.warning("%s is broken from line %d on; what stood there is found anew", path, number)
            return


def copy_shards(source: Path, target: Path, places: Sequence[int]) -> None:
    """Copy the shards of a folder into another one, each as a whole or not at all.

    Args:
        source: A folder that `RolloutWriter` wrote.
        target: The other folder; created where it is missing.
        places: Where each place of the source lies there.
    """
    for path in shards(source):
        place = places[int(path.stem.rpartition("-")[2])]
        with replacing(target / _SHARDS.replace("*", f"{place:06d}")) as temporary:
            shutil.copyfile(path, temporary)


def completed_ids(folder: Path) -> set[str]:
    """Find the queries whose rollouts are in a folder; none where the folder is missing or empty.

    Args:
        folder: A folder that `RolloutWriter` wrote.

    Raises:
        ValueError: A shard is broken, or a query is in two shards.
    """
    completed: set[str] = set()
    for path in _shards(folder):
        with open_parquet(path, _SCHEMA) as file:
            ids = set(file.read(columns=["id"]).column("id").to_pylist())
        if twice := completed & ids:
            raise ValueError(f"{path} holds query {min(twice)!r}, as another shard beside it; delete one of them")
        completed |= ids
    return completed


def read_header(folder: Path) -> Header:
    """Read what the rollouts of a folder are about.

    Args:
        folder: A folder that `RolloutWriter` wrote.

    Raises:
        ValueError: The folder holds no rollouts, or a shard is broken or disagrees with the others.
    """
    header = None
    for path in shards(folder):
        with open_parquet(path, _SCHEMA) as file:
            found = header_of(file)
        header = header or found
        _check_header(path, found, header)
    assert header is not None
    return header


def shards(folder: Path) -> list[Path]:
    """List the shards of a folder in their order.

    Args:
        folder: A folder that `RolloutWriter` wrote.

    Raises:
        ValueError: There is none.
    """
    paths = _shards(folder)
    if not paths:
        raise ValueError(f"{folder} holds no rollouts ({_SHARDS}); run stage=explore")
    return paths


def read_shard(path: Path) -> Iterator[Rollout]:
    """Read the rollouts of one shard, some rows at a time.

    Args:
        path: The shard.

    Raises:
        ValueError: It is missing, broken or not a shard.
    """
    for row in _rows(path):
        if row["score"] is not None:
            yield Rollout(**row | {"pruned_layers": tuple(row["pruned_layers"])})


def read_rollouts(folder: Path) -> Iterator[Rollout]:
    """Read all rollouts of a folder, some rows at a time, in their order.

    Args:
        folder: A folder that `RolloutWriter` wrote.

    Raises:
        ValueError: The folder holds no rollouts, or a shard is broken.
    """
    for path in shards(folder):
        yield from read_shard(path)


def read_likelihoods(folder: Path) -> Iterator[Likelihood]:
    """Read the dense rewards of a folder, those of rollouts too, some rows at a time, in their order.

    Args:
        folder: A folder that `RolloutWriter` wrote.

    Raises:
        ValueError: The folder holds no rollouts, or a shard is broken.
    """
    for path in shards(folder):
        for row in _rows(path):
            if row["nats_per_token"] is not None:
                yield Likelihood(row["id"], tuple(row["pruned_layers"]), row["nats_per_token"])


def by_query(rollouts: Iterable[OneKind]) -> Iterator[list[OneKind]]:
    """Gather the rollouts, or likelihoods, of each query.

    Args:
        rollouts: Rollouts, each query's one after another.
    """
    for _, group in itertools.groupby(rollouts, key=lambda rollout: rollout.id):
        yield list(group)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with open_parquet(path, _SCHEMA) as file:
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
            yield from batch.to_pylist()


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob(_SHARDS))


def _check_header(path: Path, found: Header, expected: Header) -> None:
    for name in ("num_layers", "score"):
        if getattr(found, name) != getattr(expected, name):
            raise ValueError(
                f"{path} has {name}={getattr(found, name)!r}, where {getattr(expected, name)!r} is expected; "
                "rollouts of different SLMs or scores need folders of their own"
            )


def _check_rollout(rollout: Tried, num_layers: int) -> None:
    layers = rollout.pruned_layers
    if list(layers) != sorted(set(layers).intersection(range(num_layers))):
        raise ValueError(
            f"a rollout of query {rollout.id!r} has pruned_layers={list(layers)}; allowed: numbers from 0 to "
            f"{num_layers - 1} in ascending order, none twice"
        )
    for name in ("nats_per_token", "score"):
        value = getattr(rollout, name)
        if value is not None and not math.isfinite(value):
            raise ValueError(f"a rollout of query {rollout.id!r} has {name}={value}; allowed: finite numbers")
