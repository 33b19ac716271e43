"""Greedy generation with a configuration for each row: prompts run once, drafts verified some tokens at a time.

Greedy decoding under a configuration gives a known continuation exactly when each of its tokens is the most likely one given
the tokens before it. So where rows have drafts, usually what other configurations answered to the same query, a pass takes
several tokens of them at once: as far as a row agrees, they are its output, and where it departs from them, the agreed ones are
what it would have generated, and the draft is dropped. The outputs are those of plain greedy decoding; in floating point a
near-tie can fall the other way, since a pass over many tokens or rows rounds differently from a pass over one.

Shapes: B = rows in the batch, T = slots of the cache, C = tokens of a row in a pass, N = new tokens, D = drafts of a row,
L = layers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dynprune.slm.cache import KeyValues, cache_of_rows, keys_and_values
from dynprune.slm.loading import SLM
from dynprune.slm.prompt_states import PromptStates
from dynprune.slm.pruning import LayerPruner, configuration_mask

# Making a batch anew copies its cache, which takes about as long as a pass: it is done when no more than this share of the rows
# is left, or when so many wait for each row that is left.
_RENEW_BELOW = 2 / 3
_WAITING_PER_ROW = 1 / 2
# A pass over so many tokens, of all rows together, takes not much longer than over one: its time goes into reading weights.
_TOKENS_A_PASS = {"cpu": 64}
_TOKENS_A_PASS_ELSEWHERE = 1024
_MOST_TOKENS_A_ROW = 16
# Looking ahead pays where at least this share of the rows has something to verify.
_DRAFTED_SHARE = 0.5
_NO_TOKEN = -1


@dataclass(frozen=True)
class Continuation:
    """What one row generated.

    Attributes:
        token_ids: The tokens, without the stop token.
        truncated: Whether the token limit came before the stop token.
        cut: Whether the row was given up before its end, see `Request.give_up`.
        accepted: How many of the tokens were taken over from drafts.
    """

    token_ids: tuple[int, ...]
    truncated: bool
    cut: bool = False
    accepted: int = 0


@dataclass(frozen=True)
class Request:
    """One row to generate.

    Attributes:
        prompt: Its tokens, at least two.
        pruned_layers: Its configuration.
        max_new_tokens: Limit of the continuation, its stop token included.
        drafts: Continuations that it may well repeat, the likeliest first.
        give_up: Says of the tokens so far whether what follows them does not matter; ``None`` generates to the end.
    """

    prompt: tuple[int, ...]
    pruned_layers: tuple[int, ...]
    max_new_tokens: int
    drafts: tuple[tuple[int, ...], ...] = ()
    give_up: Callable[[tuple[int, ...]], bool] | None = None


class GenerationQueue:
    """Requests that are generated in one batch, which is filled up as rows end; more may come while results are taken.

    Iterating yields the key of a request and its continuation, in the order in which they finish.
    """

    def __init__(self, slm: SLM, pruner: LayerPruner, batch_size: int, states: PromptStates) -> None:
        """Starts empty.

        Args:
            slm: The SLM.
            pruner: Its pruner, entered.
            batch_size: Rows generated together, at most.
            states: What configurations of one prompt share; it may serve several queues of the same SLM and adapters.

        Raises:
            ValueError: If the batch size is below 1.
        """
        check_batch_size(batch_size)
        self._slm = slm
        self._pruner = pruner
        self._batch_size = batch_size
        self._states = states
        self._waiting: dict[int, Request] = {}
        self._may_draft = True

    def submit(self, key: int, request: Request) -> None:
        """Adds a request under a key of its own."""
        assert len(request.prompt) > 1
        self._waiting[key] = request
        window = getattr(self._slm.model.config.get_text_config(), "sliding_window", None)
        # A sliding window counts the slots of rejected drafts as positions.
        if window is not None and len(request.prompt) + _MOST_TOKENS_A_ROW * request.max_new_tokens > window:
            self._may_draft = False

    def __iter__(self) -> Iterator[tuple[int, Continuation]]:
        """Generates until nothing waits."""
        batch = _Batch(self._slm, self._pruner, [])
        while self._waiting or batch.num_live:
            batch = self._renewed(batch)
            yield from batch.step(self._may_draft)

    @torch.inference_mode()
    def _renewed(self, batch: "_Batch") -> "_Batch":
        """Drops the rows that are done and fills the batch up, where it pays."""
        live = batch.num_live
        room = self._batch_size - live
        few_left = live <= _RENEW_BELOW * len(batch.rows)
        if not few_left and min(len(self._waiting), room) < _WAITING_PER_ROW * live:
            return batch
        # Prompts of similar length together, from wherever the rows are that have waited longest.
        first = next(iter(self._waiting), None)
        length = len(self._waiting[first].prompt) if first is not None else 0
        keys = sorted(self._waiting, key=lambda key: abs(len(self._waiting[key].prompt) - length))
        started = self._started({key: self._waiting.pop(key) for key in keys[:room]})
        return _Batch(self._slm, self._pruner, [*batch.live_rows(), *started])

    def _started(self, requests: dict[int, Request]) -> list["_Row"]:
        """Runs the prompts of new rows, all but their last tokens."""
        if not requests:
            return []
        choices_BL = configuration_mask(self._slm, [request.pruned_layers for request in requests.values()])
        prompts = [request.prompt[:-1] for request in requests.values()]
        states = self._states.run(self._slm, self._pruner, prompts, [tuple(choices) for choices in choices_BL.tolist()])
        return [
            _Row(key, request, choices_L, key_values)
            for (key, request), choices_L, key_values in zip(requests.items(), choices_BL, states, strict=True)
        ]


def check_batch_size(batch_size: int) -> None:
    """Checks how many rows are generated together.

    Raises:
        ValueError: If it is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"hardware.batch_size={batch_size} leaves no row; allowed: at least 1")


def generate_all(
    slm: SLM, pruner: LayerPruner, requests: Sequence[Request], batch_size: int, states: PromptStates | None = None
) -> Iterator[tuple[int, Continuation]]:
    """Generates requests that are all known at the start; see `GenerationQueue`.

    Args:
        slm: The SLM.
        pruner: Its pruner, entered.
        requests: The requests.
        batch_size: Rows generated together, at most.
        states: What configurations of one prompt share; ``None`` where no prompt comes twice.

    Yields:
        The position of a request and its continuation, in the order in which they finish.
    """
    queue = GenerationQueue(slm, pruner, batch_size, PromptStates(0) if states is None else states)
    for position, request in enumerate(requests):
        queue.submit(position, request)
    yield from queue


@dataclass
class _Row:
    """One row between two batches.

    Attributes:
        key: The request's key.
        request: The request.
        choices_L: Which layers it prunes.
        key_values: By layer, keys and values of the prompt and of what it has said, without the last token; ``None`` where
            the layer is pruned.
        said: What it has said.
        accepted: How much of that came from drafts.
    """

    key: int
    request: Request
    choices_L: Tensor
    key_values: Sequence[KeyValues | None]
    said: tuple[int, ...] = ()
    accepted: int = 0

    @property
    def cached(self) -> int:
        """Number of tokens in the cache."""
        return len(self.request.prompt) + len(self.said) - 1


class _Batch:
    """The rows being decoded, as tensors.

    A row's tokens lie on the right of the cache. The slots on their left are no tokens, and nothing looks at them; nor at
    those of drafts that were rejected, which the next batch leaves out.
    """

    def __init__(self, slm: SLM, pruner: LayerPruner, rows: Sequence[_Row]) -> None:
        """Fills the cache with the rows and puts their configurations in force."""
        # Without what they brought: those keys and values are views that would keep the last batch's cache.
        self.rows = [replace(row, key_values=()) for row in rows]
        self._slm = slm
        self._live_B = torch.ones(len(rows), dtype=torch.bool, device=slm.device)
        if not rows:
            return
        self._choices_BL = torch.stack([row.choices_L for row in rows])
        pruner.prune(self._choices_BL)
        width = max(row.cached for row in rows)
        self._cache = cache_of_rows([row.key_values for row in rows], width, slm.model.dtype, slm.device)
        self._attention_BT = self._tensor([[0] * (width - row.cached) + [1] * row.cached for row in rows])
        self._position_B = self._tensor([row.cached for row in rows])
        self._last_B = self._tensor([[*row.request.prompt, *row.said][-1] for row in rows])
        self._limit_B = self._tensor([row.request.max_new_tokens for row in rows])
        self._length_B = self._tensor([len(row.said) for row in rows])
        self._accepted_B = self._tensor([row.accepted for row in rows])
        self._stopped_B = torch.zeros_like(self._live_B)
        self._stop_ids = self._tensor(slm.stop_ids)
        # Room behind the end for the tokens that a pass looks ahead.
        room = max(row.request.max_new_tokens for row in rows) + _MOST_TOKENS_A_ROW
        said_BN = torch.full((len(rows), room), _NO_TOKEN)
        most = max(len(row.request.drafts) for row in rows)
        drafts_BDN = torch.full((len(rows), most, room), _NO_TOKEN)
        for place, row in enumerate(rows):
            said_BN[place, : len(row.said)] = torch.tensor(row.said, dtype=torch.long)
            for number, draft in enumerate(row.request.drafts):
                drafts_BDN[place, number, : len(draft)] = torch.tensor(draft[:room], dtype=torch.long)
        # Filled on the CPU: row by row, each transfer would wait for a GPU.
        self._said_BN, self._drafts_BDN = said_BN.to(slm.device), drafts_BDN.to(slm.device)

    @property
    def num_live(self) -> int:
        """Rows that are not finished."""
        return int(self._live_B.sum())

    def live_rows(self) -> list[_Row]:
        """The rows that are not finished, with their part of the cache."""
        if not self.rows:
            return []
        live = self._live_B.nonzero()[:, 0].tolist()
        # Bookkeeping is done on the CPU, with a transfer for all rows: number by number, each would wait for a GPU.
        attention_BT, accepted = self._attention_BT.cpu(), self._accepted_B.tolist()
        choices_BL, among_kept_BL = self._choices_BL.tolist(), ((~self._choices_BL).cumsum(dim=0) - 1).tolist()
        rows = []
        for place, said in zip(live, self._said(live), strict=True):
            tokens_T = attention_BT[place].nonzero()[:, 0]
            first = int(tokens_T[0])
            # Slots in a row are taken as a view.
            in_a_row = len(tokens_T) == attention_BT.shape[1] - first
            slots = slice(first, None) if in_a_row else tokens_T.to(self._slm.device)
            key_values = [
                None if pruned else keys_and_values(self._cache, layer, among_kept, slots)
                for layer, (pruned, among_kept) in enumerate(zip(choices_BL[place], among_kept_BL[place], strict=True))
            ]
            row = self.rows[place]
            rows.append(_Row(row.key, row.request, row.choices_L, key_values, said, accepted[place]))
        return rows

    @torch.inference_mode()
    def step(self, may_draft: bool) -> Iterator[tuple[int, Continuation]]:
        """One pass over the last token of each row and, where it pays, over what its drafts say next.

        Args:
            may_draft: Whether rejected tokens may be left in the cache until the batch is made anew.

        Yields:
            The keys and continuations of the rows that this pass finishes.
        """
        ahead_BC = self._ahead(may_draft)
        count = 1 + ahead_BC.shape[1]
        columns_C = torch.arange(count, device=self._slm.device)
        likeliest_BC = self._slm.model(
            input_ids=torch.cat([self._last_B[:, None], ahead_BC.clamp(min=0)], dim=1),
            attention_mask=torch.cat([self._attention_BT, self._attention_BT.new_ones(len(self.rows), count)], dim=1),
            position_ids=self._position_B[:, None] + columns_C,
            cache=self._cache,
            use_cache=True,
        ).logits.argmax(dim=-1)
        agreed_B = (ahead_BC == likeliest_BC[:, :-1]).long().cumprod(dim=1).sum(dim=1)
        right_BC = (columns_C <= agreed_B[:, None]).long()
        self._attention_BT = torch.cat([self._attention_BT, right_BC], dim=1)
        self._position_B = self._position_B + 1 + agreed_B
        live_before_B, length_before_B = self._live_B, self._length_B
        for column in range(count):
            self._say(likeliest_BC[:, column], column <= agreed_B, column < agreed_B)
        last_B = self._said_BN.gather(1, (self._length_B - 1).clamp(min=0)[:, None])[:, 0]
        self._last_B = torch.where(self._length_B > 0, last_B, self._last_B)
        cut = self._give_up(length_before_B)
        finished = (live_before_B & ~self._live_B).nonzero()[:, 0].tolist()
        if not finished:
            return
        stopped, accepted = self._stopped_B.tolist(), self._accepted_B.tolist()
        for place, said in zip(finished, self._said(finished), strict=True):
            yield (
                self.rows[place].key,
                Continuation(
                    said,
                    truncated=place not in cut and not stopped[place],
                    cut=place in cut,
                    accepted=accepted[place],
                ),
            )

    def _ahead(self, may_draft: bool) -> Tensor:
        """What the drafts of each row say next, as many columns as one pass should verify."""
        nothing_BC = self._last_B.new_empty(len(self.rows), 0)
        budget = _TOKENS_A_PASS.get(self._slm.device.type, _TOKENS_A_PASS_ELSEWHERE)
        count = min(budget // len(self.rows), _MOST_TOKENS_A_ROW) - 1
        if not may_draft or count < 1 or not self._drafts_BDN.shape[1]:
            return nothing_BC
        columns_N = torch.arange(self._said_BN.shape[1], device=self._slm.device)
        said_or_not_B1N = (columns_N >= self._length_B[:, None])[:, None]
        agrees_BD = ((self._drafts_BDN == self._said_BN[:, None]) | said_or_not_B1N).all(dim=-1)
        first_B11 = agrees_BD.long().argmax(dim=1)[:, None, None]
        draft_BN = self._drafts_BDN.gather(1, first_B11.expand(-1, 1, len(columns_N)))[:, 0]
        ahead_BC = draft_BN.gather(1, self._length_B[:, None] + columns_N[:count])
        ahead_BC = ahead_BC.masked_fill(~agrees_BD.any(dim=1)[:, None], _NO_TOKEN)
        drafted_B = (ahead_BC[:, 0] != _NO_TOKEN) & self._live_B
        return ahead_BC if drafted_B.sum() >= _DRAFTED_SHARE * self._live_B.sum() else nothing_BC

    def _say(self, token_B: Tensor, right_B: Tensor, drafted_B: Tensor) -> None:
        """Appends a token to the rows that are not finished, where it is right."""
        growing_B = self._live_B & right_B
        stop_B = growing_B & torch.isin(token_B, self._stop_ids)
        growing_B = growing_B & ~stop_B
        here_B1 = self._length_B[:, None]
        self._said_BN.scatter_(1, here_B1, torch.where(growing_B, token_B, _NO_TOKEN)[:, None])
        self._length_B = self._length_B + growing_B
        self._accepted_B = self._accepted_B + (growing_B & drafted_B)
        self._stopped_B = self._stopped_B | stop_B
        self._live_B = self._live_B & ~stop_B & (self._length_B < self._limit_B)

    def _give_up(self, before_B: Tensor) -> set[int]:
        """Ends the rows whose requests say so, at the token where they say it first.

        Args:
            before_B: Lengths of the rows before this pass, which may have added several tokens.
        """
        growing = [place for place in (self._length_B > before_B).nonzero()[:, 0].tolist() if self.rows[place].request.give_up]
        if not growing:
            return set()
        # Token by token, what has reached its limit is not looked at any more, but what is about to stop is.
        before, looked_at = before_B.tolist(), (self._live_B | self._stopped_B).tolist()
        cut = set()
        for place, said in zip(growing, self._said(growing), strict=True):
            give_up = self.rows[place].request.give_up
            assert give_up is not None
            ends = range(before[place] + 1, len(said) + looked_at[place])
            end = next((end for end in ends if give_up(said[:end])), None)
            if end is not None:
                cut.add(place)
                self._length_B[place] = end
                self._live_B[place] = False
        return cut

    def _said(self, places: Sequence[int]) -> list[tuple[int, ...]]:
        """What some rows have said."""
        said_BN, length = self._said_BN.cpu(), self._length_B.tolist()
        return [tuple(said_BN[place, : length[place]].tolist()) for place in places]

    def _tensor(self, numbers: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self._slm.device)
