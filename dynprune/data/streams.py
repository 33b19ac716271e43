"""The streams that routers learn from: preference pairs and rollouts, read from parquet as they are needed.

An epoch's order is that of the parquet files' pieces (row groups, shards), drawn anew, and then that of a
shuffle buffer; both follow from the seed and the epoch. In that order the items are dealt out in turn: to the
ranks of a distributed run, and a rank's to the workers of its DataLoader. So the ranks' batches together are one
process's batch, of as many items as theirs together, where there are no workers; each of them reads everything
for that. Every rank gets
equally many, since ranks that run out of batches at different times wait for each other without end: where the
ranks do not divide the items, the last ranks also get the first items of the order, one each. With one rank
nothing is repeated, and nothing is ever left out.

Legend: B = configurations read together, L = the SLM's decoder layers.
"""

import itertools
import math
import random
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from dynprune.data.pairs import PAIR_SCHEMA
from dynprune.data.parquet import header_of, open_parquet
from dynprune.data.rollouts import Rollout, by_query, read_header, read_shard, shards

Item = dict[str, Any]
Allows = Callable[[Tensor], Tensor]

# A query's pairs stand side by side, up to some hundreds: a smaller buffer would mix too few queries.
SHUFFLE_BUFFER = 16_384
_WIDEN = "raise router.k_max or allow more of router.prunable_layers"


class _Stream(IterableDataset[Item]):
    """Items in pieces of known sizes, shuffled and dealt out."""

    def __init__(self, sizes: Sequence[int], shuffle_buffer: int, seed: int | None) -> None:
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer={shuffle_buffer} holds no item; allowed: at least 1")
        self._sizes = list(sizes)
        self._shuffle_buffer = shuffle_buffer
        self._seed = seed
        self._epoch = 0
        self._replica = (0, 1)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the items; workers that outlive an epoch keep the order that they started with.

        Args:
            epoch: Number of the epoch.
        """
        self._epoch = epoch

    def __len__(self) -> int:
        """Count the items of an epoch on this rank."""
        _, ranks = self._rank_of_ranks()
        return math.ceil(sum(self._sizes) / ranks)

    def __iter__(self) -> Iterator[Item]:
        """Iterate over this rank's and this worker's items of the epoch."""
        rank, ranks = self._rank_of_ranks()
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        order = list(range(len(self._sizes)))
        if self._seed is not None:
            random.Random(f"{self._seed}-{self._epoch}").shuffle(order)

        items = self._read(order)
        if self._seed is not None:
            # As the first worker of the first rank drew when each had an order of its own: routers of then are those of now.
            items = _shuffled(items, self._shuffle_buffer, random.Random(f"{self._seed}-{self._epoch}-0-0"))
        dealt = _filled_up(items, -sum(self._sizes) % ranks)
        return itertools.islice(dealt, rank + ranks * worker, None, ranks * workers)

    def __getstate__(self) -> dict[str, Any]:
        """Take the rank along: a worker process that is not forked belongs to no process group."""
        return self.__dict__ | {"_replica": self._rank_of_ranks()}

    def _rank_of_ranks(self) -> tuple[int, int]:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return self._replica

    @abstractmethod
    def _read(self, pieces: Iterable[int]) -> Iterator[Item]:
        """Read pieces, one after another."""


class PairStream(_Stream):
    """Preference pairs, for DPO, ORPO and their kin, and to validate every method.

    An item is ``{"id", "winner_mask_L", "loser_mask_L", "winner_score", "loser_score"}``; the masks are
    boolean tensors, True where a layer is pruned.

    Attributes:
        num_layers: L.
    """

    def __init__(self, path: Path, allows: Allows, seed: int | None, shuffle_buffer: int = SHUFFLE_BUFFER) -> None:
        """Read the pairs once, to count those that the policy can tell apart.

        Args:
            path: A file that `write_pairs` wrote.
            allows: Says of mask_BL which configurations are possible (`Policy.allows`); a pair of which one
                is not is left out.
            seed: Seed of the order, drawn anew each epoch; ``None`` keeps the file's order.
            shuffle_buffer: Pairs in each worker's memory, from which the next one is drawn.

        Raises:
            ValueError: The file is missing, broken or not a file of pairs, no pair is possible, or the buffer
                holds no item.
        """
        self._path = path
        self._allows = allows
        with open_parquet(path, PAIR_SCHEMA) as file:
            self.num_layers = header_of(file).num_layers
            sizes = [len(self._possible(file, group)) for group in range(file.num_row_groups)]
        if not any(sizes):
            raise ValueError(f"no pair in {path} has two configurations that the policy allows; {_WIDEN}")
        super().__init__(sizes, shuffle_buffer, seed)

    def _possible(self, file: pq.ParquetFile, group: int) -> list[dict[str, Any]]:
        rows = file.read_row_group(group).to_pylist()
        winner_mask_BL = _masks_BL([row["winner_pruned_layers"] for row in rows], self.num_layers)
        loser_mask_BL = _masks_BL([row["loser_pruned_layers"] for row in rows], self.num_layers)
        allowed_B = self._allows(winner_mask_BL) & self._allows(loser_mask_BL)
        return list(itertools.compress(rows, allowed_B.tolist()))

    def _read(self, pieces: Iterable[int]) -> Iterator[Item]:
        with open_parquet(self._path, PAIR_SCHEMA) as file:
            for group in pieces:
                for row in self._possible(file, group):
                    yield {
                        "id": row["id"],
                        "winner_mask_L": _mask_L(row["winner_pruned_layers"], self.num_layers),
                        "loser_mask_L": _mask_L(row["loser_pruned_layers"], self.num_layers),
                        "winner_score": row["winner_score"],
                        "loser_score": row["loser_score"],
                    }


class RolloutStream(_Stream):
    """Rollouts, all of them or those that a filter keeps, each beside what its query's rollouts are like.

    An item is ``{"id", "mask_L", "score", "desirable", "mean_score", "mean_pruned"}``: a boolean tensor, True
    where a layer is pruned; whether the filter keeps the rollout; and the means of the score and of the number
    of pruned layers over all rollouts of the query. A shard is read as a whole: it is no larger than what was
    appended at once.

    Attributes:
        num_layers: L.
        num_items: Items of an epoch, on all ranks together.
        num_pruned: Their pruned layers, all together.
        deepest: The most layers that one of them prunes.
    """

    def __init__(
        self,
        folder: Path,
        allows: Allows,
        keep: Callable[[Sequence[Rollout]], Iterable[Rollout]],
        seed: int | None,
        shuffle_buffer: int = SHUFFLE_BUFFER,
        only_kept: bool = True,
    ) -> None:
        """Read the rollouts once, to count what is kept.

        Args:
            folder: A folder that `RolloutWriter` wrote.
            allows: Says of mask_BL which configurations are possible (`Policy.allows`); the others are left
                out before the filter sees a query's rollouts.
            keep: The filter: chooses among the rollouts of one query, the same ones every time;
                `keep_successful` with its thresholds bound, for example.
            seed: Seed of the order, drawn anew each epoch; ``None`` keeps the order of the shards.
            shuffle_buffer: Rollouts in each worker's memory, from which the next one is drawn.
            only_kept: Whether what the filter does not keep is left out.

        Raises:
            ValueError: The folder holds no rollouts, a shard is broken, nothing is kept, or the buffer holds
                no item.
        """
        self._shards = shards(folder)
        self._allows = allows
        self._keep = keep
        self._only_kept = only_kept
        self.num_layers = read_header(folder).num_layers
        self.num_pruned = self.deepest = 0
        any_kept = False
        sizes = []
        for shard in range(len(self._shards)):
            items = self._items(shard)
            sizes.append(len(items))
            depths = [int(item["mask_L"].sum()) for item in items]
            self.num_pruned += sum(depths)
            self.deepest = max([self.deepest, *depths])
            any_kept = any_kept or any(item["desirable"] for item in items)
        if not any_kept:
            raise ValueError(
                f"no rollout in {folder} passes the filter and is allowed by the policy; lower "
                "the method's min_score (or that of method.start, where it starts from another method), or explore more "
                f"queries (exploration.max_queries, for validation exploration.max_validation_queries), or {_WIDEN}"
            )
        self.num_items = sum(sizes)
        super().__init__(sizes, shuffle_buffer, seed)

    def _items(self, shard: int) -> list[Item]:
        rollouts = list(read_shard(self._shards[shard]))
        allowed_B = self._allows(_masks_BL([rollout.pruned_layers for rollout in rollouts], self.num_layers))
        possible = itertools.compress(rollouts, allowed_B.tolist())
        return [item for of_query in by_query(possible) for item in self._items_of_query(of_query)]

    def _items_of_query(self, rollouts: Sequence[Rollout]) -> Iterator[Item]:
        kept = set(self._keep(rollouts))
        mean_score = fmean(rollout.score for rollout in rollouts)
        mean_pruned = fmean(len(rollout.pruned_layers) for rollout in rollouts)
        for rollout in rollouts:
            if rollout in kept or not self._only_kept:
                yield {
                    "id": rollout.id,
                    "mask_L": _mask_L(rollout.pruned_layers, self.num_layers),
                    "score": rollout.score,
                    "desirable": rollout in kept,
                    "mean_score": mean_score,
                    "mean_pruned": mean_pruned,
                }

    def _read(self, pieces: Iterable[int]) -> Iterator[Item]:
        for shard in pieces:
            yield from self._items(shard)


def _masks_BL(configurations: Sequence[Sequence[int]], num_layers: int) -> Tensor:
    mask_BL = torch.zeros(len(configurations), num_layers, dtype=torch.bool)
    rows = [row for row, layers in enumerate(configurations) for _ in layers]
    mask_BL[rows, list(itertools.chain.from_iterable(configurations))] = True
    return mask_BL


def _mask_L(pruned_layers: Sequence[int], num_layers: int) -> Tensor:
    mask_L = torch.zeros(num_layers, dtype=torch.bool)
    mask_L[list(pruned_layers)] = True
    return mask_L


def _filled_up(items: Iterable[Item], missing: int) -> Iterator[Item]:
    """Yield the items, and then as many as are missing once more, from the first one on."""
    again: list[Item] = []
    for item in items:
        if len(again) < missing:
            again.append(item)
        yield item
    # There may be fewer items than ranks.
    yield from itertools.islice(itertools.cycle(again), missing)


def _shuffled(items: Iterable[Item], buffer_size: int, rng: random.Random) -> Iterator[Item]:
    """Yield the items in a random order, with no more than `buffer_size` of them in memory."""
    buffer: list[Item] = []
    for item in items:
        if len(buffer) < buffer_size:
            buffer.append(item)
        else:
            drawn = rng.randrange(buffer_size)
            yield buffer[drawn]
            buffer[drawn] = item
    rng.shuffle(buffer)
    yield from buffer
