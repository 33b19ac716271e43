"""The rollout engine: drives one search per query, many at once, so that batches fill across queries.

Each configuration that a search proposes is generated with a draft: what other configurations have answered to the same query,
the most frequent answer first (before any, the reference answer). See `dynprune.slm.generation` on why the outputs are those of
plain greedy decoding.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from dynprune.data.prompts import render_answer, render_prompt
from dynprune.data.rollouts import Rollout
from dynprune.data.tasks import Query
from dynprune.exploration.strategy import Configuration, Proposals, Strategy
from dynprune.slm.generation import Continuation, Request, generate_all
from dynprune.slm.loading import SLM
from dynprune.slm.pruning import LayerPruner

# More than one, so that the stragglers of several batches are decoded together.
_BATCHES_AT_ONCE = 4


@dataclass
class _Search:
    """One query's search under way."""

    query: Query
    prompt: tuple[int, ...]
    proposals: Proposals
    drafts: Counter[Continuation]
    pending: tuple[Configuration, ...] = ()
    rollouts: list[Rollout] = field(default_factory=list)


def explore(
    slm: SLM,
    pruner: LayerPruner,
    queries: Sequence[Query],
    strategy: Strategy,
    score: Callable[[str, Query], float],
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> Iterator[list[Rollout]]:
    """Searches configurations for each query.

    Args:
        slm: The SLM.
        pruner: Its pruner with adapters, entered.
        queries: The queries.
        strategy: Proposes configurations for one query and receives their scores.
        score: Scores an output of the SLM.
        max_new_tokens: Limit of each output, stop token included.
        batch_size: Configurations generated together, over all queries.
        seed: Seed of the searches; each query's search depends on it and on the query's id alone.

    Yields:
        All rollouts of one query, as soon as its search ends; not in the order of the queries.
    """
    waiting = iter(queries)
    active: list[_Search] = []
    while True:
        while sum(len(search.pending) for search in active) < _BATCHES_AT_ONCE * batch_size:
            query = next(waiting, None)
            if query is None:
                break
            search = _start(slm, query, strategy, seed)
            if search.pending:
                active.append(search)
        if not active:
            return
        _roll_out(slm, pruner, active, score, max_new_tokens, batch_size)
        for search in [search for search in active if not search.pending]:
            active.remove(search)
            yield search.rollouts


def _start(slm: SLM, query: Query, strategy: Strategy, seed: int) -> _Search:
    # The builtin hash of a string differs from process to process; Random seeds from the text itself.
    proposals = strategy.propose(slm.num_layers, random.Random(f"{seed}-{query.id}"))
    reference = slm.tokenizer(render_answer(query), add_special_tokens=False).input_ids
    return _Search(
        query=query,
        prompt=tuple(slm.tokenizer(render_prompt(slm.tokenizer, query), add_special_tokens=False).input_ids),
        proposals=proposals,
        # Never seen, so whatever has been seen comes first.
        drafts=Counter({Continuation(tuple(reference), truncated=False): 0}),
        pending=next(proposals, ()),
    )


def _roll_out(
    slm: SLM,
    pruner: LayerPruner,
    active: Sequence[_Search],
    score: Callable[[str, Query], float],
    max_new_tokens: int,
    batch_size: int,
) -> None:
    """Generates what all searches have proposed, and lets them propose again."""
    owners = [(search, configuration) for search in active for configuration in search.pending]
    requests = [Request(search.prompt, configuration, search.drafts.most_common(1)[0][0]) for search, configuration in owners]
    rollout_of: dict[int, Rollout] = {}
    for position, continuation in generate_all(slm, pruner, requests, max_new_tokens, batch_size):
        search, configuration = owners[position]
        output = slm.decode(continuation.token_ids)
        rollout_of[position] = Rollout(
            id=search.query.id,
            pruned_layers=configuration,
            score=score(output, search.query),
            output=output,
        )
        search.drafts[Continuation(continuation.token_ids, continuation.truncated)] += 1
    rollouts = [rollout_of[position] for position in range(len(owners))]
    for search in active:
        count = len(search.pending)
        mine, rollouts = rollouts[:count], rollouts[count:]
        search.rollouts += mine
        try:
            search.pending = search.proposals.send([rollout.score for rollout in mine])
        except StopIteration:
            search.pending = ()
