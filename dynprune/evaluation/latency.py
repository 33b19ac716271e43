"""Timing rows of the table against each other: the same queries, the same token counts, in turns, in one run.

For each query the rows take turns in random order, first with their prompts, then pass by pass, so that a machine that grows
slower meets all of them alike: what lasts longer than a pass slows all rows of a query, and drops out of their ratios. A row's
time is that of the router (tokenising, encoding, choosing), of the prompt (prefill) and of each further token (decode). All
rows generate the number of tokens that the full SLM's answer has: a pruned SLM that stops early would look fast. A row may
decode in a way of its own, such as by drafts that the full SLM verifies.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch

from dynprune.data.tasks import Query
from dynprune.slm.cache import ReservingCache
from dynprune.slm.decoding import decode_pruned
from dynprune.slm.loading import SLM
from dynprune.slm.pruning import LayerPruner, cache_bytes

Chooser = Callable[[Query], Sequence[int]]
# From a prompt, a configuration, a number of tokens and an empty cache: yields after each pass, the first over the prompt.
# Other rows prune the SLM between two passes.
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
        warmup: How many queries are run first without being counted.
        seed: Seed of the order of turns, which a query's id makes its own: it is the same whichever were timed before.

    Yields:
        A timing for each query and row.
    """
    # Where few are left, some warm up several times.
    first = islice(cycle(range(len(queries))), warmup)
    for position in [*first, *range(-len(queries), 0)]:
        rng = random.Random(f"{seed} {queries[position].id}")
        timings = _time_query(slm, pruner, queries[position], prompts[position], tokens[position], rows, rng)
        if position < 0:
            yield from timings


@torch.inference_mode()
def _time_query(
    slm: SLM,
    pruner: LayerPruner,
    query: Query,
    prompt: Sequence[int],
    tokens: int,
    rows: Mapping[str, TimedRow],
    rng: random.Random,
) -> list[Timing]:
    route, prefill, decode = {}, {}, dict.fromkeys(rows, 0.0)
    caches = {name: ReservingCache() for name in rows}
    running: dict[str, Iterator[object]] = {}
    for name in rng.sample(sorted(rows), len(rows)):
        # A router may read the SLM's own first layers: they run as they are, not as the row before pruned them.
        pruner.prune(())
        start = now(slm.device)
        configuration = rows[name].choose(query)
        routed = now(slm.device)
        running[name] = rows[name].decode(slm, pruner, prompt, configuration, tokens, caches[name])
        next(running[name])
        route[name], prefill[name] = routed - start, now(slm.device) - routed
    while running:
        for name in rng.sample(sorted(running), len(running)):
            start = now(slm.device)
            if next(running[name], None) is None:
                del running[name]
            else:
                decode[name] += now(slm.device) - start
    return [
        Timing(query.id, name, tokens, route[name], prefill[name], decode[name], cache_bytes(caches[name])) for name in rows
    ]


def now(device: torch.device) -> float:
    """The clock in seconds, once a device has done what it was asked for: a GPU works on when Python has gone on already."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
