"""Lossless drafting: cheap guesses at the next tokens, which the full SLM verifies some at a time.

Greedy decoding gives a known continuation exactly when each of its tokens is the most likely one given the tokens before it,
and one pass of the full SLM says so for several tokens. Such a pass takes little longer than one over a single token, since its
time goes into reading weights. Two drafters:

- The pruned SLM (self-speculative decoding: Zhang et al., Draft & Verify, 2023, arXiv 2309.08168; Elhoushi et al., LayerSkip,
  2024, arXiv 2404.16710). It reads the full SLM's keys and values of the text so far, and what it writes behind them is dropped
  before the full SLM verifies.
- Look-up (Saxena, Prompt Lookup Decoding, 2023): what followed the last few tokens where they stood before, in the prompt or in
  the output. It costs nothing, and answers that call functions repeat names from their prompts.

The output is that of plain greedy decoding with the full SLM; in floating point a near-tie can fall the other way, since a pass
over several tokens rounds differently from a pass over one. One row at a time.

Shapes: T = tokens of a pass, V = vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynprune.slm.cache import ReservingCache
from dynprune.slm.loading import SLM
from dynprune.slm.pruning import LayerPruner

# Longer matches were tried on function calls and gave no more accepted tokens.
_LONGEST_MATCH = 3


@dataclass(frozen=True)
class Drafting:
    """How drafts are made.

    Attributes:
        lookup: Whether to look the last tokens up in the text before; the pruned SLM drafts where they are not found.
        draft_tokens: Tokens of a draft, at most.
        min_probability: The pruned SLM ends its draft after a token that it gives a lower probability, 0..1.
    """

    lookup: bool
    draft_tokens: int
    min_probability: float

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            ValueError: If a number is out of its range.
        """
        if self.draft_tokens < 1:
            raise ValueError(
                f"evaluation.lossless: draft_tokens={self.draft_tokens} drafts nothing; allowed: at least 1, for example 5"
            )
        if not 0 <= self.min_probability <= 1:
            raise ValueError(f"evaluation.lossless: min_probability={self.min_probability} is no probability; allowed: 0 to 1")


@dataclass(frozen=True)
class Round:
    """What one pass of the full SLM gave.

    Attributes:
        token_ids: Tokens that it found right, and the one that it says after them.
        proposed: Length of the draft.
        draft_passes: Passes of the pruned SLM that the draft took.
    """

    token_ids: tuple[int, ...]
    proposed: int
    draft_passes: int

    @property
    def accepted(self) -> int:
        """How many tokens of the draft were right."""
        return len(self.token_ids) - 1


@dataclass(frozen=True)
class Speculation:
    """What the full SLM says, and what that took.

    Attributes:
        token_ids: The tokens, without the stop token.
        truncated: Whether the token limit came before the stop token.
        proposed: Tokens that were drafted.
        accepted: How many of `token_ids` come from drafts.
        passes: Passes of the full SLM, that over the prompt included.
        draft_passes: Passes of the pruned SLM.
    """

    token_ids: tuple[int, ...]
    truncated: bool
    proposed: int
    accepted: int
    passes: int
    draft_passes: int


def speculative_generate(
    slm: SLM,
    pruner: LayerPruner,
    prompt: Sequence[int],
    configuration: Sequence[int],
    max_new_tokens: int,
    drafting: Drafting,
) -> Speculation:
    """Generates the full SLM's greedy answer.

    Args:
        slm: The SLM.
        pruner: Its pruner, entered.
        prompt: The tokens to continue, at least one.
        configuration: Layers that the drafting SLM leaves out; with none it drafts nothing, since it would be the full SLM.
        max_new_tokens: Limit of the answer, its stop token included; at least 1.
        drafting: How to draft.
    """
    rounds: list[Round] = []
    said: list[int] = []
    accepted, stopped = 0, False
    stop_ids = set(slm.stop_ids)
    for made in speculate(slm, pruner, prompt, configuration, max_new_tokens, ReservingCache(), drafting):
        rounds.append(made)
        end = next((place for place, token in enumerate(made.token_ids) if token in stop_ids), None)
        said += made.token_ids[:end]
        accepted += made.accepted if end is None else min(end, made.accepted)
        stopped = end is not None
        if stopped:
            break
    return Speculation(
        token_ids=tuple(said),
        truncated=not stopped,
        proposed=sum(made.proposed for made in rounds),
        accepted=accepted,
        passes=len(rounds),
        draft_passes=sum(made.draft_passes for made in rounds),
    )


@torch.inference_mode()
def speculate(
    slm: SLM,
    pruner: LayerPruner,
    prompt: Sequence[int],
    configuration: Sequence[int],
    new_tokens: int,
    cache: ReservingCache,
    drafting: Drafting,
) -> Iterator[Round]:
    """Generates a number of tokens, whether or not one of them is a stop token.

    Args:
        slm: The SLM.
        pruner: Its pruner, entered.
        prompt: The tokens to continue, at least one.
        configuration: Layers that the drafting SLM leaves out; with none it drafts nothing.
        new_tokens: How many tokens to generate, at least 1.
        cache: An empty cache. Between rounds it holds the full SLM's keys and values of all tokens but the last.
        drafting: How to draft.

    Yields:
        What each pass of the full SLM gives; the first is the pass over the prompt, which verifies nothing.
    """
    assert prompt
    assert new_tokens > 0
    pruner.prune(())
    first = int(_logits(slm, prompt, 0, cache, last=1)[0].argmax())
    text = [*prompt, first]
    yield Round((first,), proposed=0, draft_passes=0)
    end = len(prompt) + new_tokens
    while len(text) < end:
        # The pass itself gives a token after those that it verifies.
        count = min(drafting.draft_tokens, end - len(text) - 1)
        draft = look_up(text, count) if drafting.lookup else ()
        by_lookup = bool(draft)
        if not by_lookup and configuration:
            pruner.prune(configuration)
            draft = _pruned_draft(slm, text, count, drafting.min_probability, cache)
            cache.crop(-len(draft))
        pruner.prune(())
        likeliest = _logits(slm, [text[-1], *draft], len(text) - 1, cache, last=0).argmax(dim=-1).tolist()
        accepted = next((place for place, token in enumerate(draft) if token != likeliest[place]), len(draft))
        cache.crop(accepted - len(draft))
        new = (*draft[:accepted], likeliest[accepted])
        text += new
        yield Round(new, proposed=len(draft), draft_passes=0 if by_lookup else len(draft))


@torch.inference_mode()
def is_near_tie(slm: SLM, pruner: LayerPruner, prompt: Sequence[int], one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two continuations part where the full SLM finds both likeliest, but for rounding.

    Args:
        slm: The SLM.
        pruner: Its pruner, entered.
        prompt: What they continue.
        one: A continuation without its stop token.
        other: A different one.

    Returns:
        Whether the logits of both tokens, a stop token where one ends, lie within rounding of the largest. How much rounding
        matters there is seen from two ways to compute them: in one pass, and token by token.
    """
    assert tuple(one) != tuple(other)
    shorter = min(len(one), len(other))
    common = next((place for place in range(shorter) if one[place] != other[place]), shorter)
    pruner.prune(())
    text, cache = [*prompt, *one[:common]], ReservingCache()
    logits_V = _logits(slm, text, 0, ReservingCache(), last=1)[0].float()
    again_V = logits_V
    for start, end in [(0, len(prompt) - 1), *((place, place + 1) for place in range(len(prompt) - 1, len(text)))]:
        if end > start:
            again_V = _logits(slm, text[start:end], start, cache, last=1)[0].float()
    candidates = [list(said[common : common + 1]) or list(slm.stop_ids) for said in (one, other)]
    lowest = min(float(logits_V[tokens].max()) for tokens in candidates)
    rounding = max(float((logits_V - again_V).abs().max()), torch.finfo(slm.model.dtype).eps * float(logits_V.abs().max()))
    # Each of the two logits may be off by that much, either way.
    return float(logits_V.max()) - lowest <= 4 * rounding


def look_up(text: Sequence[int], count: int) -> tuple[int, ...]:
    """What followed the last tokens of a text where they stood before.

    Args:
        text: The tokens.
        count: Tokens to give, at most.

    Returns:
        The tokens after the longest match of the text's end, up to a length of three; the latest of several; nothing where
        not even the last token stood before.
    """
    last = len(text) - 1
    longest, behind = 0, len(text)
    for place in range(last - 1, -1, -1):
        length = 0
        while length < min(_LONGEST_MATCH, place + 1) and text[place - length] == text[last - length]:
            length += 1
        if length > longest:
            longest, behind = length, place + 1
        if longest == _LONGEST_MATCH:
            break
    return tuple(text[behind : behind + count])


def _pruned_draft(slm: SLM, text: Sequence[int], count: int, min_probability: float, cache: ReservingCache) -> tuple[int, ...]:
    """What the SLM says next as it is pruned now; each token is a pass, and leaves one in the cache."""
    draft: list[int] = []
    while len(draft) < count:
        token = draft[-1] if draft else text[-1]
        logits_V = _logits(slm, [token], len(text) - 1 + len(draft), cache, last=1)[0]
        probability, likeliest = logits_V.float().softmax(dim=-1).max(dim=-1)
        draft.append(int(likeliest))
        if float(probability) < min_probability or draft[-1] in slm.stop_ids:
            break
    return tuple(draft)


def _logits(slm: SLM, ids: Sequence[int], past: int, cache: ReservingCache, last: int) -> Tensor:
    """logits_TV of the last tokens of a pass, 0 for all of them."""
    ids_1T = torch.tensor([list(ids)], device=slm.device)
    positions_1T = torch.arange(past, past + len(ids), device=slm.device)[None]
    logits_1TV: Tensor = slm.model(
        input_ids=ids_1T, position_ids=positions_1T, cache=cache, use_cache=True, logits_to_keep=last
    ).logits
    return logits_1TV[0]
