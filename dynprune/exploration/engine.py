"""The rollout engine: drives one search per query, many at once, so that batches fill across queries.

Each configuration that a search wants generated is generated with drafts: what other configurations have answered to the same
query, the most frequent answers first, and before there are any the reference answer. See `dynprune.slm.generation` on why the
outputs are those of plain greedy decoding. An output is cut where its score is certain to be 0 already, see
`dynprune.metrics.certainty`.

What a search wants estimated fills batches of its own, see `estimate_configurations`, so one search's estimates are made at a
time, those of the search that has waited longest, up to its next generation or its end. That happens whenever generation has
less than a batch to do: so its batches stay full, and searches end one after another, where estimates first would keep every
search's generations waiting for the estimates of all. None waits without end, since each search in flight has a budget, and no
search is started while another waits for estimates.
"""

import itertools
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from dynprune.data.prompts import answer_tokens, prompt_tokens
from dynprune.data.rollouts import Likelihood, Rollout, Tried
from dynprune.data.tasks import Query
from dynprune.exploration.strategy import Configuration, Estimate, Proposal, Proposals, Strategy, estimating_all
from dynprune.slm.generation import Continuation, GenerationQueue, Request
from dynprune.slm.likelihood import estimate_configurations
from dynprune.slm.loading import SLM
from dynprune.slm.prompt_states import PromptStates
from dynprune.slm.pruning import LayerPruner

# Searches under way at once, by rows of a batch: some are between two proposals, and each keeps what its prompt shares.
_SEARCHES_A_ROW = 1.25
_MOST_DRAFTS = 4


@dataclass
class _Search:
    """One query's search under way.

    Attributes:
        query: The query.
        prompt: Its tokens.
        answer: The reference answer's tokens, without a stop token.
        max_new_tokens: Limit of an output.
        proposals: The search.
        drafts: How often each output was generated.
        pending: What was proposed last; ``None`` where the search has ended.
        earlier: What an earlier attempt at this search generated, by configuration.
        earlier_nats: What it estimated, in nats a token.
        outputs: Rollouts of the configurations that were proposed last.
        tried: All that is known of each configuration, in the order in which they were proposed first.
    """

    query: Query
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    max_new_tokens: int
    proposals: Proposals
    drafts: Counter[tuple[int, ...]]
    pending: Proposal | None
    earlier: Mapping[Configuration, Rollout]
    earlier_nats: Mapping[Configuration, float]
    outputs: dict[Configuration, Rollout] = field(default_factory=dict)
    tried: dict[Configuration, Tried] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """What an exploration has found since its last step.

    Attributes:
        new: Rollouts, and estimates, which may be of the same configurations.
        ended: All that a search found that has ended, in its own order: a rollout with its estimate, if there is one, or an
            estimate alone; ``None`` where none has ended.
    """

    new: list[Tried]
    ended: list[Tried] | None = None


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
    estimate_all: bool = False,
    earlier: Sequence[Tried] = (),
) -> Iterator[Step]:
    """Searches configurations for each query.

    Args:
        slm: The SLM.
        pruner: Its pruner with adapters, entered.
        queries: The queries.
        strategy: Proposes configurations for one query and receives their scores or dense rewards.
        score: Scores an output of the SLM.
        lost: Whether the beginning of an output is certain to score 0; it is cut there. ``None`` cuts nothing.
        max_tokens_margin: Outputs may have so many times the tokens of the query's reference answer: an SLM that a
            configuration ruined often talks on and on.
        batch_size: Configurations generated together, over all queries.
        shared_bytes: Memory for what configurations of one query share.
        seed: Seed of the searches; each query's search depends on it and on the query's id alone.
        estimate_all: Whether whatever the strategy generates gets a dense reward beside its score.
        earlier: What was new in the steps of an earlier attempt: it is neither generated nor estimated again, nor new again.

    Yields:
        What was found, as it is found; the searches do not end in the order of the queries.
    """
    earlier_of: dict[str, list[Tried]] = {}
    for one in earlier:
        earlier_of.setdefault(one.id, []).append(one)

    def start(query: Query) -> _Search:
        return _start(slm, query, strategy, max_tokens_margin, seed, estimate_all, earlier_of.get(query.id, []))

    queue = GenerationQueue(slm, pruner, batch_size, PromptStates(shared_bytes))
    engine = _Engine(slm, pruner, queue, batch_size, score, lost)
    waiting = map(start, queries)
    while True:
        engine.admit(waiting)
        yield from (Step([], list(search.tried.values())) for search in engine.take_ended())
        if not engine.is_busy:
            return
        yield Step(engine.work())


class _Engine:
    """Searches in flight: those whose outputs are being generated, and those that wait for estimates."""

    def __init__(
        self,
        slm: SLM,
        pruner: LayerPruner,
        queue: GenerationQueue,
        batch_size: int,
        score: Callable[[str, Query], float],
        lost: Callable[[str, Query], bool] | None,
    ) -> None:
        self._slm, self._pruner, self._queue, self._batch_size = slm, pruner, queue, batch_size
        self._score, self._lost = score, lost
        self._generated = iter(queue)
        self._numbers = itertools.count()
        self._owner_of: dict[int, tuple[_Search, Configuration]] = {}
        # The one that waits longest first.
        self._estimating: deque[_Search] = deque()
        self._ended: list[_Search] = []

    @property
    def is_busy(self) -> bool:
        """Whether any search is in flight."""
        return bool(self._owner_of or self._estimating)

    def admit(self, waiting: Iterator[_Search]) -> None:
        """Starts searches, as many as keep the batch full."""
        while not self._estimating and len(self._owner_of) < _SEARCHES_A_ROW * self._batch_size:
            if (search := next(waiting, None)) is None:
                return
            self._submit(search)

    def take_ended(self) -> list[_Search]:
        """The searches that have ended since this was asked last."""
        ended, self._ended = self._ended, []
        return ended

    def work(self) -> list[Tried]:
        """Estimates where a search waits for that while generation has less than a batch to do, else generates."""
        has_room = self._estimating and len(self._owner_of) < self._batch_size
        return self._estimate() if has_room else self._take(*next(self._generated))

    def _submit(self, search: _Search) -> None:
        """Takes on what a search wants next, beyond what an earlier attempt answers."""
        _answer_from_earlier(search)
        if search.pending is None:
            self._ended.append(search)
            return
        if isinstance(search.pending, Estimate):
            self._estimating.append(search)
            return
        drafts = tuple(draft for draft, _ in search.drafts.most_common(_MOST_DRAFTS))
        give_up = None if self._lost is None else partial(_is_lost, self._slm, search.query, self._lost)
        for configuration in search.pending.configurations:
            if configuration in search.outputs:
                continue
            number = next(self._numbers)
            self._owner_of[number] = (search, configuration)
            self._queue.submit(number, Request(search.prompt, configuration, search.max_new_tokens, drafts, give_up))

    def _take(self, number: int, continuation: Continuation) -> list[Tried]:
        """Takes an output; its search goes on if it wanted no other."""
        search, configuration = self._owner_of.pop(number)
        output = self._slm.decode(continuation.token_ids)
        if continuation.cut:
            # The cut may go through a character.
            output = output.rstrip("\ufffd")
        score = self._score(output, search.query)
        rollout = Rollout(search.query.id, configuration, score, output, continuation.cut)
        search.outputs[configuration] = rollout
        search.drafts[continuation.token_ids] += 1
        assert search.pending is not None
        if len(search.outputs) == len(search.pending.configurations):
            _take_scores(search)
            self._submit(search)
        return [rollout]

    def _estimate(self) -> list[Tried]:
        """Makes the next estimates of the search that has waited longest; it stays the next until it wants something else."""
        search = self._estimating.popleft()
        assert isinstance(search.pending, Estimate)
        wanted = search.pending.configurations
        left = [configuration for configuration in wanted if configuration not in search.earlier_nats]
        nats = estimate_configurations(self._slm, self._pruner, (search.prompt, search.answer), left)
        known = {**search.earlier_nats, **dict(zip(left, nats, strict=True))}
        _take_estimates(search, [known[configuration] for configuration in wanted])
        _answer_from_earlier(search)
        if isinstance(search.pending, Estimate):
            self._estimating.appendleft(search)
        else:
            self._submit(search)
        return [Likelihood(search.query.id, configuration, known[configuration]) for configuration in left]


def max_new_tokens(slm: SLM, query: Query, margin: float) -> int:
    """Most tokens of an output, its stop token included: so many times those of the query's reference answer."""
    return math.ceil(margin * (len(answer_tokens(slm.tokenizer, query)) + 1))


def _is_lost(slm: SLM, query: Query, lost: Callable[[str, Query], bool], token_ids: tuple[int, ...]) -> bool:
    return lost(slm.decode(token_ids), query)


def _start(
    slm: SLM,
    query: Query,
    strategy: Strategy,
    max_tokens_margin: float,
    seed: int,
    estimate_all: bool,
    earlier: Sequence[Tried],
) -> _Search:
    # The builtin hash of a string differs from process to process; Random seeds from the text itself.
    proposals = strategy.propose(slm.num_layers, random.Random(f"{seed}-{query.id}"))
    if estimate_all:
        proposals = estimating_all(proposals)
    reference = answer_tokens(slm.tokenizer, query)
    return _Search(
        query=query,
        prompt=prompt_tokens(slm.tokenizer, query),
        answer=reference,
        max_new_tokens=max_new_tokens(slm, query, max_tokens_margin),
        proposals=proposals,
        # Never seen, so whatever has been seen comes first.
        drafts=Counter({reference: 0}),
        pending=next(proposals),
        earlier={one.pruned_layers: one for one in earlier if isinstance(one, Rollout)},
        earlier_nats={one.pruned_layers: one.nats_per_token for one in earlier if isinstance(one, Likelihood)},
    )


def _answer_from_earlier(search: _Search) -> None:
    """Lets a search go on as long as an earlier attempt has all that it wants."""
    while search.pending is not None:
        wanted = search.pending.configurations
        if isinstance(search.pending, Estimate):
            if any(configuration not in search.earlier_nats for configuration in wanted):
                return
            _take_estimates(search, [search.earlier_nats[configuration] for configuration in wanted])
        else:
            search.outputs |= {
                configuration: search.earlier[configuration] for configuration in wanted if configuration in search.earlier
            }
            if len(search.outputs) < len(wanted):
                return
            _take_scores(search)


def _take_scores(search: _Search) -> None:
    """Keeps the outputs of what was proposed and sends their scores, in that order."""
    assert search.pending is not None
    scores = []
    for configuration in search.pending.configurations:
        rollout = search.outputs.pop(configuration)
        if (estimated := search.tried.get(configuration)) is not None:
            assert isinstance(estimated, Likelihood), "no configuration is generated twice"
            rollout = replace(rollout, nats_per_token=estimated.nats_per_token)
        search.tried[configuration] = rollout
        scores.append(rollout.score)
    _propose_again(search, scores)


def _take_estimates(search: _Search, nats: Sequence[float]) -> None:
    """Keeps the estimates of what was proposed and sends them."""
    assert search.pending is not None
    for configuration, nats_per_token in zip(search.pending.configurations, nats, strict=True):
        rollout = search.tried.get(configuration)
        assert not isinstance(rollout, Likelihood), "no configuration is estimated twice"
        search.tried[configuration] = (
            Likelihood(search.query.id, configuration, nats_per_token)
            if rollout is None
            else replace(rollout, nats_per_token=nats_per_token)
        )
    _propose_again(search, nats)


def _propose_again(search: _Search, answers: Sequence[float]) -> None:
    try:
        search.pending = search.proposals.send(answers)
    except StopIteration:
        search.pending = None
