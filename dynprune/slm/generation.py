"""Greedy generation with a configuration for each row, sped up by verifying drafts.

Greedy decoding under a configuration gives a known continuation exactly when each of its tokens is the most likely one given
the tokens before it. So a draft, usually what another configuration answered to the same query, costs one pass over prompt
and draft: where the row agrees with all of it, the draft is its output; where it departs from it, the agreed tokens are what it
would have generated, and decoding goes on from there. The outputs are those of plain greedy decoding; in floating point a
near-tie can fall the other way, since a pass over many tokens rounds differently from a pass over one.

Shapes: B = rows still in the batch, R = all rows, T = tokens in the cache, N = new tokens, V = vocabulary, L = layers.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dynprune.slm.cache import ReservingCache
from dynprune.slm.loading import SLM
from dynprune.slm.pruning import LayerPruner, configuration_mask

# Compacting the batch copies its cache, which costs about as much as one decoding step.
_COMPACT_BELOW = 0.75
# Most answers are shorter; what is left of a batch after so many steps waits for company, twice as many the next time.
_STEPS = 48


@dataclass(frozen=True)
class Continuation:
    """What one row generated.

    Attributes:
        token_ids: The tokens, without the stop token.
        truncated: Whether the token limit came before the stop token.
        accepted: How many of the tokens were taken over from the draft.
    """

    token_ids: tuple[int, ...]
    truncated: bool
    accepted: int = 0


@dataclass(frozen=True)
class Request:
    """One row to generate.

    Attributes:
        prompt: Its tokens.
        pruned_layers: Its configuration.
        max_new_tokens: Limit of the continuation, its stop token included.
        draft: A continuation that it may well repeat, where there is one.
    """

    prompt: tuple[int, ...]
    pruned_layers: tuple[int, ...]
    max_new_tokens: int
    draft: Continuation | None = None


class GenerationQueue:
    """Requests that are generated in batches of similar length; more may come while results are taken.

    A row that goes on long after the others of its batch would be decoded nearly alone. Such rows are put aside until
    they fill a batch of their own, or nothing else waits; what they have said so far is their draft then.

    Iterating yields the key of a request and its continuation, in the order in which they finish.
    """

    def __init__(self, slm: SLM, pruner: LayerPruner, batch_size: int) -> None:
        """Starts empty.

        Args:
            slm: The SLM.
            pruner: Its pruner, entered.
            batch_size: Rows generated together, at most.
        """
        self._slm = slm
        self._pruner = pruner
        self._batch_size = batch_size
        self._fresh: dict[int, Request] = {}
        self._aside: dict[int, Request] = {}
        self._accepted: dict[int, int] = {}
        self._steps: dict[int, int] = {}

    def submit(self, key: int, request: Request) -> None:
        """Adds a request under a key of its own."""
        self._fresh[key] = request

    def __iter__(self) -> Iterator[tuple[int, Continuation]]:
        """Generates until nothing waits."""
        while self._fresh or self._aside:
            waiting = self._aside if len(self._aside) >= self._batch_size or not self._fresh else self._fresh
            # Longest first: if a batch does not fit the memory, that shows at once.
            keys = sorted(waiting, key=lambda key: _length(waiting[key]), reverse=True)[: self._batch_size]
            requests = [waiting.pop(key) for key in keys]
            alone = not self._fresh and not self._aside
            steps = None if alone else min(self._steps.get(key, _STEPS) for key in keys)
            results = _generate(self._slm, self._pruner, requests, steps)
            for key, request, (continuation, finished) in zip(keys, requests, results, strict=True):
                self._accepted.setdefault(key, continuation.accepted)
                if finished:
                    self._steps.pop(key, None)
                    yield key, replace(continuation, accepted=self._accepted.pop(key))
                else:
                    self._aside[key] = replace(request, draft=continuation)
                    self._steps[key] = 2 * self._steps.get(key, _STEPS)


def generate_all(
    slm: SLM, pruner: LayerPruner, requests: Sequence[Request], batch_size: int
) -> Iterator[tuple[int, Continuation]]:
    """Generates requests that are all known at the start; see `GenerationQueue`.

    Yields:
        The position of a request and its continuation, in the order in which they finish.
    """
    queue = GenerationQueue(slm, pruner, batch_size)
    for position, request in enumerate(requests):
        queue.submit(position, request)
    yield from queue


def generate(slm: SLM, pruner: LayerPruner, requests: Sequence[Request]) -> list[Continuation]:
    """Continues prompts greedily as one batch, each row under its own configuration.

    Args:
        slm: The SLM.
        pruner: Its pruner, entered; it is left with the configurations of some of the rows.
        requests: The R rows.

    Returns:
        The continuations, in the order of the requests.
    """
    return [continuation for continuation, _ in _generate(slm, pruner, requests, None)]


def _length(request: Request) -> int:
    return len(request.prompt) + (len(request.draft.token_ids) if request.draft else 0)


@torch.inference_mode()
def _generate(
    slm: SLM, pruner: LayerPruner, requests: Sequence[Request], max_steps: int | None
) -> list[tuple[Continuation, bool]]:
    """Generates one batch, at most so many tokens beyond the drafts.

    Returns:
        Each row's continuation and whether it is finished.
    """
    drafts = _usable_drafts(slm, requests)
    mask_BL = configuration_mask(slm, [request.pruned_layers for request in requests])
    pruner.prune(mask_BL)
    batch, following_B, agreed_R = _prefill(slm, requests, drafts)

    rows_B = torch.arange(len(requests), device=slm.device)
    stop_ids = torch.tensor(slm.stop_ids, device=slm.device)
    limit_R = torch.tensor([request.max_new_tokens for request in requests], device=slm.device)
    said_RN = torch.zeros(len(requests), int(limit_R.max()), dtype=torch.long, device=slm.device)
    for row, (draft, agreed) in enumerate(zip(drafts, agreed_R.tolist(), strict=True)):
        said_RN[row, :agreed] = torch.tensor(draft[:agreed], dtype=torch.long)
    length_R = agreed_R.clone()
    live_R = length_R < limit_R
    stopped_R = torch.zeros_like(live_R)
    for step in itertools.count():
        stopped_R[rows_B] |= torch.isin(following_B, stop_ids) & live_R[rows_B]
        live_R &= ~stopped_R
        growing = rows_B[live_R[rows_B]]
        said_RN[growing, length_R[growing]] = following_B[live_R[rows_B]]
        length_R[growing] += 1
        live_R &= length_R < limit_R
        left = live_R[rows_B].nonzero()[:, 0]
        if not len(left) or step == max_steps:
            break
        if len(left) <= _COMPACT_BELOW * len(rows_B):
            mask_BL = pruner.select_rows(batch.cache, mask_BL, left)
            batch.select_rows(left)
            rows_B = rows_B[left]
        following_B = batch.step(slm, said_RN[rows_B, length_R[rows_B] - 1])
    columns = (said_RN.tolist(), length_R.tolist(), stopped_R.tolist(), live_R.tolist(), agreed_R.tolist())
    return [
        (Continuation(tuple(ids[:length]), truncated=not stopped, accepted=agreed), not live)
        for ids, length, stopped, live, agreed in zip(*columns, strict=True)
    ]


@dataclass
class _Batch:
    """The rows being decoded: their cache, which of its slots they may look at, and their next positions."""

    cache: ReservingCache
    attention_BT: Tensor
    position_B: Tensor

    def step(self, slm: SLM, token_B: Tensor) -> Tensor:
        """Appends a token to each row and gives the most likely next ones."""
        self.attention_BT = torch.cat([self.attention_BT, self.attention_BT.new_ones(len(token_B), 1)], dim=1)
        logits_B1V = slm.model(
            input_ids=token_B[:, None],
            attention_mask=self.attention_BT,
            position_ids=self.position_B[:, None],
            cache=self.cache,
            use_cache=True,
        ).logits
        self.position_B = self.position_B + 1
        return logits_B1V[:, -1].argmax(dim=-1)

    def select_rows(self, rows: Tensor) -> None:
        """Drops all other rows; the cache is the pruner's to cut."""
        self.attention_BT = self.attention_BT[rows]
        self.position_B = self.position_B[rows]


def _prefill(slm: SLM, requests: Sequence[Request], drafts: Sequence[tuple[int, ...]]) -> tuple[_Batch, Tensor, Tensor]:
    """One pass over prompts and drafts.

    Returns:
        The batch, the next token of each row, and how many tokens of its draft each row agrees with.
    """
    sequences = [(*request.prompt, *draft) for request, draft in zip(requests, drafts, strict=True)]
    width = max(len(sequence) for sequence in sequences)
    pad = slm.tokenizer.pad_token_id
    ids_BT = torch.tensor([[pad] * (width - len(s)) + list(s) for s in sequences], device=slm.device)
    attention_BT = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences], device=slm.device)
    cache = ReservingCache()
    keep = max(len(draft) for draft in drafts) + 1
    logits_BKV = slm.model(
        input_ids=ids_BT,
        attention_mask=attention_BT,
        position_ids=(attention_BT.cumsum(dim=1) - 1).clamp(min=0),
        cache=cache,
        use_cache=True,
        logits_to_keep=keep,
    ).logits
    likeliest = logits_BKV.argmax(dim=-1).tolist()
    agreed, following = [], []
    for row, draft in enumerate(drafts):
        predicted = likeliest[row][keep - 1 - len(draft) :]
        count = next((i for i, token in enumerate(draft) if predicted[i] != token), len(draft))
        agreed.append(count)
        following.append(predicted[count])
        # The rest of the draft is not what this row says: nothing may look at its slots.
        attention_BT[row, width - len(draft) + count :] = 0
    agreed_B = torch.tensor(agreed, device=slm.device)
    position_B = torch.tensor([len(request.prompt) for request in requests], device=slm.device) + agreed_B
    return _Batch(cache, attention_BT, position_B), torch.tensor(following, device=slm.device), agreed_B


def _usable_drafts(slm: SLM, requests: Sequence[Request]) -> list[tuple[int, ...]]:
    """The drafts' tokens; none where a sliding window would count the slots of a rejected draft as positions."""
    window = getattr(slm.model.config.get_text_config(), "sliding_window", None)
    longest = max(len(request.prompt) + 2 * request.max_new_tokens for request in requests)
    if window is not None and longest > window:
        return [()] * len(requests)
    return [request.draft.token_ids[: request.max_new_tokens] if request.draft else () for request in requests]
