import itertools
import random
from collections.abc import Sequence

import pytest
import torch
from transformers import DynamicCache

from dynprune.adapters.stack import AdapterStack
from dynprune.slm import speculative
from dynprune.slm.cache import ReservingCache
from dynprune.slm.loading import SLM
from dynprune.slm.pruning import LayerPruner
from dynprune.slm.speculative import Drafting, is_near_tie, look_up, speculate, speculative_generate

ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral", "gemma3_text"]
L = 4
ALL = [c for k in range(L + 1) for c in itertools.combinations(range(L), k)]
NOTHING = Drafting(lookup=False, draft_tokens=1, min_probability=0.0)


@pytest.fixture(params=ARCHITECTURES)
def slm(request, make_slm) -> SLM:
    # With its embeddings as its head, a random Gemma says its last token again and again.
    return make_slm(request.param, tie_word_embeddings=False)


def random_adapters(scale: float) -> AdapterStack:
    torch.manual_seed(1)
    adapters = AdapterStack(num_layers=L, hidden_size=32, bottleneck=4).requires_grad_(False)
    for parameter in adapters.parameters():
        parameter.copy_(torch.randn_like(parameter) * scale)
    return adapters


def prompts(rng: random.Random, n: int) -> list[list[int]]:
    """Of few different tokens, so that there is something to look up."""
    return [[rng.randrange(0, rng.choice([3, 250])) for _ in range(rng.randint(2, 40))] for _ in range(n)]


def plain(slm: SLM, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    """What transformers generates, its stop token included."""
    ids = torch.tensor([list(prompt)])
    out = slm.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=256,
        eos_token_id=list(slm.stop_ids) or None,
    )
    return out[0, len(prompt) :].tolist()


def without_stop_tokens(slm: SLM) -> SLM:
    slm.model.generation_config.eos_token_id = slm.tokenizer.eos_token = None
    return slm


def weaken(slm: SLM, layers: Sequence[int], share: float) -> None:
    """Makes layers change the hidden states by so much of what they did."""
    for index in layers:
        slm.layers[index].self_attn.o_proj.weight.mul_(share)
        slm.layers[index].mlp.down_proj.weight.mul_(share)
        for name in ("post_attention_layernorm", "post_feedforward_layernorm"):
            if hasattr(slm.layers[index], "post_feedforward_layernorm"):
                # Gemma normalises what a block adds, with a weight of 1 more than the parameter.
                norm = getattr(slm.layers[index], name)
                norm.weight.copy_((1 + norm.weight) * share - 1)


@pytest.mark.parametrize("share", [0.05, 1.0])
def test_the_answer_is_that_of_transformers_greedy_decoding_whatever_drafts(slm, share):
    weaken(slm, range(L), share)
    # A stop token among few, so that answers end at different places.
    slm.model.generation_config.eos_token_id = list(range(0, 257, 23))
    rng = random.Random(ARCHITECTURES.index(slm.name))
    proposed, accepted, drafted, stopped = 0, 0, 0, 0
    with LayerPruner(slm, random_adapters(0.05)) as pruner:
        for prompt in prompts(rng, 5):
            pruner.prune(())
            want = plain(slm, prompt, 12)
            for _ in range(5):
                drafting = Drafting(rng.random() < 0.5, rng.randint(1, 9), rng.choice([0.0, 0.3, 1.0]))
                got = speculative_generate(slm, pruner, prompt, rng.choice(ALL), 12, drafting)
                ends = want[-1] in slm.stop_ids
                assert list(got.token_ids) == (want[:-1] if ends else want)
                assert got.truncated == (not ends)
                assert got.passes + got.accepted >= len(want) - 1
                assert got.accepted <= min(got.proposed, len(got.token_ids))
                proposed, accepted = proposed + got.proposed, accepted + got.accepted
                drafted, stopped = drafted + got.draft_passes, stopped + ends
    assert 0 < accepted < proposed
    assert drafted > 0
    assert 0 < stopped < 25


@pytest.mark.parametrize("drafted", ["right", "wrong", "half right"])
@pytest.mark.parametrize("count", [1, 3, 50])
def test_passes_are_those_that_the_drafts_leave_to_the_full_slm(make_slm, monkeypatch, drafted, count):
    slm, prompt = without_stop_tokens(make_slm()), [5, 6, 7, 8]
    want = plain(slm, prompt, 20)

    def known(text: Sequence[int], count: int) -> tuple[int, ...]:
        ahead = want[len(text) - len(prompt) :][:count]
        first_wrong = {"right": len(ahead), "wrong": 0, "half right": len(ahead) // 2}[drafted]
        return tuple(token if place < first_wrong else (token + 1) % 250 for place, token in enumerate(ahead))

    monkeypatch.setattr(speculative, "look_up", known)
    # By hand: the tokens of a pass are those accepted and one more, and no draft goes beyond the limit.
    left, passes, accepted = 19, 1, 0
    while left:
        length = min(count, left - 1)
        right = {"right": length, "wrong": 0, "half right": length // 2}[drafted]
        left, passes, accepted = left - 1 - right, passes + 1, accepted + right
    with LayerPruner(slm) as pruner:
        got = speculative_generate(slm, pruner, prompt, (), 20, Drafting(True, count, 0.0))
    assert list(got.token_ids) == want
    assert (got.passes, got.accepted, got.draft_passes) == (passes, accepted, 0)
    if drafted == "right":
        assert got.passes == 1 + -(-19 // (count + 1))
    if drafted == "wrong":
        assert (got.passes, got.accepted) == (20, 0)


def test_layers_that_do_nothing_draft_what_is_right(slm):
    weaken(without_stop_tokens(slm), [0, 2], 0.0)
    want = plain(slm, [5, 6, 7, 8], 22)
    with LayerPruner(slm) as pruner:
        got = speculative_generate(slm, pruner, [5, 6, 7, 8], (0, 2), 22, Drafting(False, 6, 0.0))
    assert list(got.token_ids) == want
    # Three drafts of six, each with a token of the verifying pass, after that of the prompt.
    assert (got.passes, got.proposed, got.accepted, got.draft_passes) == (4, 18, 18, 18)


class Negated:
    """Turns hidden states round."""

    num_layers, hidden_size = L, 32

    def layer(self, index: int, hidden: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        return -hidden


def test_a_pruned_slm_that_says_the_least_likely_token_drafts_nothing_right(slm):
    # The last layer does nothing and its stand-in turns the states round: the logits are those of the full SLM, negated.
    weaken(without_stop_tokens(slm), [L - 1], 0.0)
    want = plain(slm, [5, 6, 7, 8], 10)
    with LayerPruner(slm, Negated()) as pruner:
        got = speculative_generate(slm, pruner, [5, 6, 7, 8], (L - 1,), 10, Drafting(False, 3, 0.0))
    assert list(got.token_ids) == want
    # Drafts of three, the last ones as long as there is room.
    assert (got.passes, got.accepted, got.draft_passes) == (10, 0, 6 * 3 + 2 + 1)


def test_a_draft_ends_after_a_token_of_too_little_probability(make_slm):
    slm = without_stop_tokens(make_slm())
    weaken(slm, [1], 0.0)
    with LayerPruner(slm) as pruner:
        every, none = (
            speculative_generate(slm, pruner, [5, 6, 7, 8], (1,), 15, Drafting(False, 4, least)) for least in (0.0, 1.0)
        )
        ids = torch.tensor([[5, 6, 7, 8, *every.token_ids]])
        probabilities = slm.model(input_ids=ids).logits[0, 3:-1].softmax(dim=-1).max(dim=-1).values.tolist()
        middle = sorted(probabilities)[len(probabilities) // 2]
        some = speculative_generate(slm, pruner, [5, 6, 7, 8], (1,), 15, Drafting(False, 4, middle))
    assert (every.passes, none.passes) == (4, 8)
    # By hand: layer 1 does nothing, so the pruned SLM is as sure as the full one, and all that it drafts is right.
    place, passes = 1, 1
    while place < 15:
        length = 0
        while length < min(4, 15 - place - 1):
            length += 1
            if probabilities[place + length - 1] < middle:
                break
        place, passes = place + length + 1, passes + 1
    assert some.passes == passes


def test_the_cache_holds_the_full_slms_keys_and_values_after_every_round(slm):
    weaken(slm, [0], 0.0)
    right, rejected = 0, 0
    with LayerPruner(slm, random_adapters(0.0)) as pruner:
        # Layer 0 does nothing, so without it all drafts are right.
        for pruned, lookup in [((0,), False), ((0, 3), False), ((0, 3), True)]:
            for prompt in prompts(random.Random(3), 2):
                cache, text = ReservingCache(), list(prompt)
                for made in speculate(slm, pruner, prompt, pruned, 16, cache, Drafting(lookup, 4, 0.0)):
                    right += made.accepted if pruned == (0,) else 0
                    rejected += made.proposed - made.accepted
                    text += made.token_ids
                    pruner.prune(())
                    want = DynamicCache()
                    slm.model(input_ids=torch.tensor([text[:-1]]), cache=want, use_cache=True)
                    for ours, theirs in zip(cache.layers, want.layers, strict=True):
                        torch.testing.assert_close(ours.keys, theirs.keys, atol=2e-4, rtol=1e-4)
                        torch.testing.assert_close(ours.values, theirs.values, atol=2e-4, rtol=1e-4)
                assert len(text) == len(prompt) + 16
    # For both prompts three drafts of four, after the token that the prompt's pass gives.
    assert right == 2 * 3 * 4
    assert rejected > 0


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
def test_a_cache_survives_placeholders_of_a_layer_that_is_pruned_for_a_while(tokens):
    ours, theirs = ReservingCache(), DynamicCache()
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        keys, values = torch.randn(2, 1, 2, 5, 4, generator=generator)
        got, want = (cache.update(keys, values, 0) for cache in (ours, theirs))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), step
        # As many as fit into what is reserved, or more.
        placeholder = torch.zeros(1, 1, tokens, 1)
        ours.update(placeholder, placeholder, 0)
        assert ours.get_seq_length() == 5 * (step + 1) + tokens
        ours.crop(-tokens)


@pytest.mark.parametrize("architecture", ["mistral", "gemma3_text"])
def test_a_sliding_window_shorter_than_the_text_changes_nothing(make_slm, architecture):
    slm = without_stop_tokens(make_slm(architecture, sliding_window=8, tie_word_embeddings=False))
    weaken(slm, range(L), 0.1)
    rng = random.Random(4)
    with LayerPruner(slm) as pruner:
        for prompt in prompts(rng, 3):
            pruner.prune(())
            want = plain(slm, prompt, 20)
            for drafting in (Drafting(True, 5, 0.0), Drafting(False, 3, 0.0)):
                got = speculative_generate(slm, pruner, prompt, (1, 2), 20, drafting)
                assert list(got.token_ids) == want


def test_as_many_tokens_come_as_are_asked_for_past_stop_tokens_too(make_slm):
    slm = without_stop_tokens(make_slm())
    want = plain(slm, [1, 2, 3], 12)
    slm.model.generation_config.eos_token_id = want[4]
    with LayerPruner(slm) as pruner:
        for count in range(1, 13):
            made = list(speculate(slm, pruner, [1, 2, 3], (1,), count, ReservingCache(), Drafting(True, 5, 0.0)))
            assert [token for r in made for token in r.token_ids] == want[:count]
        short = speculative_generate(slm, pruner, [1, 2, 3], (1,), 12, Drafting(True, 5, 0.0))
    assert list(short.token_ids) == want[: want.index(want[4])]
    assert not short.truncated


def test_no_configuration_and_no_look_up_is_plain_decoding(make_slm):
    slm = without_stop_tokens(make_slm())
    with LayerPruner(slm) as pruner:
        got = speculative_generate(slm, pruner, [1, 2, 3], (), 7, NOTHING)
    assert list(got.token_ids) == plain(slm, [1, 2, 3], 7)
    assert (got.passes, got.proposed, got.draft_passes) == (7, 0, 0)


def test_continuations_part_at_a_near_tie_only_where_both_tokens_are_likeliest(make_slm):
    slm, prompt = make_slm(), [5, 6, 7, 8]
    said = plain(slm, prompt, 6)
    assert len(set(said)) == 6
    twin, other, stop = 250, 251, 256
    assert not {twin, other, stop} & set(said)
    head = slm.model.lm_head.weight
    head[twin] = head[said[3]]
    with LayerPruner(slm) as pruner:
        pruner.prune((1,))
        assert is_near_tie(slm, pruner, prompt, said, [*said[:3], twin, 9])
        assert not is_near_tie(slm, pruner, prompt, said, [*said[:3], other, 9])
        assert not is_near_tie(slm, pruner, prompt, said, said[:3])
        head[stop] = head[said[3]] * (1 + 1e-7)
        assert is_near_tie(slm, pruner, prompt, said, said[:3])
        # Equal to each other is not enough.
        assert not is_near_tie(slm, pruner, prompt, [*said[:4], 8], [*said[:4], 8, 9])


def naive_look_up(text: str, count: int) -> str:
    for length in (3, 2, 1):
        if len(text) > length:
            place = text.rfind(text[-length:], 0, len(text) - 1)
            if place >= 0:
                return text[place + length :][:count]
    return ""


def test_look_up_finds_what_a_string_search_finds():
    rng = random.Random(0)
    found = 0
    for _ in range(5000):
        text = "".join(rng.choice("abcdefgh"[: rng.randint(1, 8)]) for _ in range(rng.randint(1, 25)))
        count = rng.randint(0, 6)
        want = naive_look_up(text, count)
        assert look_up([ord(letter) for letter in text], count) == tuple(ord(letter) for letter in want), (text, count)
        found += bool(want)
    assert 1000 < found < 5000


@pytest.mark.parametrize(("text", "want"), [("abcab", "cab"), ("abcxbcybc", "ybc"), ("aaaa", "a"), ("abc", ""), ("a", "")])
def test_look_up_by_hand(text, want):
    assert look_up([ord(letter) for letter in text], 3) == tuple(ord(letter) for letter in want)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ((True, 0, 0.5), "draft_tokens=0 drafts nothing; allowed: at least 1"),
        ((True, 4, 1.5), r"min_probability=1.5 is no probability; allowed: 0 to 1"),
        ((True, 4, -0.1), r"min_probability=-0.1 is no probability"),
    ],
)
def test_drafting_that_cannot_be_is_refused(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        Drafting(*values)
