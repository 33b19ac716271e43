"""Timing rows of the table against each other: the same queries, the same token counts, in turns, in one run.

For each query the rows take turns in random order, so that a machine that grows slower meets all of them alike. A row's time
is that of the router (tokenising, encoding, choosing), of the prompt (prefill) and of each further token (decode). All rows
generate the number of tokens that the full SLM's answer has: a pruned SLM that stops early would look fast. A row may decode in
a way of its own, such as by drafts that the full SLM verifies.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from dynprune.data.tasks import Query
from dynprune.slm.cache import ReservingCache
from dynprune.slm.decoding import decode_pruned
from dynprune.slm.loading import SLM
from dynprune.slm.pruning import LayerPruner, cache_bytes

Chooser = Callable[[Query], Sequence[int]]
# From a prompt, a configuration, a number of tokens and an empty cache: yields after each pass, the first over the prompt.
Decoder = Callable[[SLM, LayerPruner, Sequence[int], Sequence[int], int, ReservingCache], Iterator[object]]


@dataclass(frozen=True)
class Timing:
    """One query under one row, in seconds.

    Attributes:
        id: The query's id.
        row: The row's name.
        tokens: Number of generated tokens.
        route: Time that choosing the configuration took.
        prefill: Time from the prompt to the first token.
        decode: Time of the tokens after the first.
        cache_bytes: Size of the keys and values at the end.
    """

    id: str
    row: str
    tokens: int
    route: float
    prefill: float
    decode: float
    cache_bytes: int

    @property
    def total(self) -> float:
        """Everything, in seconds."""
        return self.route + self.prefill + self.decode


@dataclass(frozen=True)
class TimedRow:
    """What is timed.

    Attributes:
        choose: Chooses the configuration, the router included.
        decode: Generates with it.
    """

    choose: Chooser
    decode: Decoder = decode_pruned


def time_rows(
    slm: SLM,
    pruner: LayerPruner,
    queries: Sequence[Query],
    prompts: Sequence[Sequence[int]],
    tokens: Sequence[int],
    rows: Mapping[str, TimedRow],
    warmup: int,
    seed: int,
) -> Iterator[Timing]:
    """Times each row on each query.

    Args:
        slm: The SLM.
        pruner: Its pruner, entered.
        queries: The queries to time.
        prompts: Their prompts, tokenised.
        tokens: How many tokens to generate for each query, at least 1.
        rows: By name, what chooses each row's configuration and generates.
        warmup: Queries that are run first without being counted.
        seed: Seed of the order of turns.

    Yields:
        A timing for each query and row.
    """
    rng = random.Random(seed)
    for position in [*range(min(warmup, len(queries))), *range(-len(queries), 0)]:
        for name in rng.sample(sorted(rows), len(rows)):
            timing = _time_one(slm, pruner, queries[position], prompts[position], tokens[position], name, rows[name])
            if position < 0:
                yield timing


@torch.inference_mode()
def _time_one(
    slm: SLM,
    pruner: LayerPruner,
    query: Query,
    prompt: Sequence[int],
    tokens: int,
    name: str,
    row: TimedRow,
) -> Timing:
    # A router may read the SLM's own first layers: they run as they are, not as the row before pruned them.
    pruner.prune(())
    start = now(slm.device)
    configuration = row.choose(query)
    routed = now(slm.device)
    cache = ReservingCache()
    passes = row.decode(slm, pruner, prompt, configuration, tokens, cache)
    next(passes)
    prefilled = now(slm.device)
    for _ in passes:
        pass
    end = now(slm.device)
    return Timing(
        id=query.id,
        row=name,
        tokens=tokens,
        route=routed - start,
        prefill=prefilled - routed,
        decode=end - prefilled,
        cache_bytes=cache_bytes(cache),
    )


def now(device: torch.device) -> float:
    """The clock in seconds, once a device has done what it was asked for: a GPU works on when Python has gone on already."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
