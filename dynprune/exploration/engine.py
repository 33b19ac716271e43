"""The rollout engine: drives one search per query, many at once, so that batches fill across queries.

Each configuration that a search proposes is generated with drafts: what other configurations have answered to the same query,
the most frequent answers first, and before there are any the reference answer. See `dynprune.slm.generation` on why the
outputs are those of plain greedy decoding. An output is cut where its score is certain to be 0 already, see
`dynprune.metrics.certainty`.
"""

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from dynprune.data.prompts import answer_tokens, prompt_tokens
from dynprune.data.rollouts import Rollout
from dynprune.data.tasks import Query
from dynprune.exploration.strategy import Configuration, Proposals, Strategy
from dynprune.slm.generation import GenerationQueue, Request
from dynprune.slm.loading import SLM
from dynprune.slm.prompt_states import PromptStates
from dynprune.slm.pruning import LayerPruner

# Searches under way at once, by rows of a batch: some are between two proposals, and each keeps what its prompt shares.
_SEARCHES_A_ROW = 1.25
_MOST_DRAFTS = 4


@dataclass
class _Search:
    """One query's search under way; `outputs` are those of the configurations that were proposed last."""

    query: Query
    prompt: tuple[int, ...]
    max_new_tokens: int
    proposals: Proposals
    drafts: Counter[tuple[int, ...]]
    pending: tuple[Configuration, ...] = ()
    outputs: dict[Configuration, Rollout] = field(default_factory=dict)
    rollouts: list[Rollout] = field(default_factory=list)


def explore(
    slm: SLM,
    pruner: LayerPruner,
    queries: Sequence[Query],
    strategy: Strategy,
    score: Callable[[str, Query], float],
    lost: Callable[[str, Query], bool] | None,
    max_tokens_margin: float,
    batch_size: int,
    shared_bytes: int,
    seed: int,
) -> Iterator[list[Rollout]]:
    """Searches configurations for each query.

    Args:
        slm: The SLM.
        pruner: Its pruner with adapters, entered.
        queries: The queries.
        strategy: Proposes configurations for one query and receives their scores.
        score: Scores an output of the SLM.
        lost: Whether the beginning of an output is certain to score 0; it is cut there. ``None`` cuts nothing.
        max_tokens_margin: Outputs may have so many times the tokens of the query's reference answer: an SLM that a
            configuration ruined often talks on and on.
        batch_size: Configurations generated together, over all queries.
        shared_bytes: Memory for what configurations of one query share.
        seed: Seed of the searches; each query's search depends on it and on the query's id alone.

    Yields:
        All rollouts of one query, as soon as its search ends; not in the order of the queries.
    """
    queue = GenerationQueue(slm, pruner, batch_size, PromptStates(shared_bytes))
    waiting = iter(queries)
    numbers = itertools.count()
    owner_of: dict[int, tuple[_Search, Configuration]] = {}

    def submit(search: _Search) -> None:
        drafts = tuple(draft for draft, _ in search.drafts.most_common(_MOST_DRAFTS))
        give_up = None if lost is None else partial(_is_lost, slm, search.query, lost)
        for configuration in search.pending:
            number = next(numbers)
            owner_of[number] = (search, configuration)
            queue.submit(number, Request(search.prompt, configuration, search.max_new_tokens, drafts, give_up))

    def start_searches() -> None:
        while len(owner_of) < _SEARCHES_A_ROW * batch_size and (query := next(waiting, None)) is not None:
            submit(_start(slm, query, strategy, max_tokens_margin, seed))

    start_searches()
    for number, continuation in queue:
        search, configuration = owner_of.pop(number)
        output = slm.decode(continuation.token_ids)
        if continuation.cut:
            # The cut may go through a character.
            output = output.rstrip("\ufffd")
        search.outputs[configuration] = Rollout(
            search.query.id, configuration, score(output, search.query), output, continuation.cut
        )
        search.drafts[continuation.token_ids] += 1
        if len(search.outputs) == len(search.pending):
            _propose_again(search)
            submit(search)
            if not search.pending:
                yield search.rollouts
        start_searches()


def max_new_tokens(slm: SLM, query: Query, margin: float) -> int:
    """Most tokens of an output, its stop token included: so many times those of the query's reference answer."""
    return math.ceil(margin * (len(answer_tokens(slm.tokenizer, query)) + 1))


def _is_lost(slm: SLM, query: Query, lost: Callable[[str, Query], bool], token_ids: tuple[int, ...]) -> bool:
    return lost(slm.decode(token_ids), query)


def _start(slm: SLM, query: Query, strategy: Strategy, max_tokens_margin: float, seed: int) -> _Search:
    # The builtin hash of a string differs from process to process; Random seeds from the text itself.
    proposals = strategy.propose(slm.num_layers, random.Random(f"{seed}-{query.id}"))
    reference = answer_tokens(slm.tokenizer, query)
    return _Search(
        query=query,
        prompt=prompt_tokens(slm.tokenizer, query),
        max_new_tokens=max_new_tokens(slm, query, max_tokens_margin),
        proposals=proposals,
        # Never seen, so whatever has been seen comes first.
        drafts=Counter({reference: 0}),
        pending=next(proposals),
    )


def _propose_again(search: _Search) -> None:
    """Sends the scores of what was proposed, in that order."""
    rollouts = [search.outputs[configuration] for configuration in search.pending]
    search.rollouts += rollouts
    search.outputs = {}
    try:
        search.pending = search.proposals.send([rollout.score for rollout in rollouts])
    except StopIteration:
        search.pending = ()
