import copy
import itertools
from collections.abc import Iterable

import pytest
import torch
from swapped import random_adapters
from transformers import DynamicCache

from dynprune.adapters.stack import AdapterStack
from dynprune.slm.cache import ReservingCache
from dynprune.slm.generation import Continuation, GenerationQueue, Request, generate_all
from dynprune.slm.loading import SLM
from dynprune.slm.prompt_states import PromptStates
from dynprune.slm.pruning import LayerPruner, starting_at

ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral", "gemma3_text"]
L = 4


@pytest.fixture(params=ARCHITECTURES)
def slm(request, make_slm) -> SLM:
    return make_slm(request.param)


class Replaced(torch.nn.Module):
    """An independent way to prune: the module itself is another one."""

    def __init__(self, adapters: AdapterStack, index: int) -> None:
        super().__init__()
        self.adapters, self.index = adapters, index

    def forward(self, hidden, *args, **kwargs):
        down = hidden @ self.adapters.down_Lbd[self.index].T + self.adapters.down_bias_Lb[self.index]
        up = down.clamp(min=0) @ self.adapters.up_Ldb[self.index].T + self.adapters.up_bias_Ld[self.index]
        # Without cache and padding, the first token of a text is the first one here.
        up[:, 0] = self.adapters.sink_Ld[self.index]
        return hidden + up


def with_replaced_layers(slm: SLM, adapters: AdapterStack, pruned: tuple[int, ...]) -> torch.nn.Module:
    model = copy.deepcopy(slm.model)
    layers = model.get_decoder().layers
    for index in pruned:
        layers[index] = Replaced(adapters, index)
    return model


@torch.no_grad()
def uncached_logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def plain_greedy(slm: SLM, adapters: AdapterStack, prompt, pruned, max_new_tokens: int) -> tuple[list[int], bool]:
    model, ids = with_replaced_layers(slm, adapters, pruned), list(prompt)
    for _ in range(max_new_tokens):
        token = int(uncached_logits(model, ids)[-1].argmax())
        if token in slm.stop_ids:
            return ids[len(prompt) :], False
        ids.append(token)
    return ids[len(prompt) :], True


def prompts(n: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(2)
    return [tuple(torch.randint(0, 250, (5 + 3 * i,), generator=generator).tolist()) for i in range(n)]


def in_order(results: Iterable[tuple[int, Continuation]]) -> list[Continuation]:
    return [continuation for _, continuation in sorted(results, key=lambda item: item[0])]


ALL = [c for k in range(L + 1) for c in itertools.combinations(range(L), k)]


def test_cached_logits_equal_uncached_recomputation_for_every_configuration_in_one_left_padded_batch(slm):
    adapters = random_adapters(L, sink=True)
    rows = prompts(len(ALL))
    extra = [11, 12, 13]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in rows])
    attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in rows])
    mask = torch.zeros(len(ALL), L, dtype=torch.bool)
    for row, pruned in enumerate(ALL):
        mask[row, list(pruned)] = True
    cache = DynamicCache()
    position = torch.tensor([len(p) for p in rows])
    got = []
    with LayerPruner(slm, adapters) as pruner:
        pruner.prune(mask)
        out = slm.model(
            input_ids=ids,
            attention_mask=attention,
            position_ids=(attention.cumsum(1) - 1).clamp(min=0),
            cache=cache,
            use_cache=True,
        )
        got.append(out.logits[:, -1])
        for step, token in enumerate(extra):
            attention = torch.cat([attention, torch.ones(len(rows), 1, dtype=torch.long)], dim=1)
            out = slm.model(
                input_ids=torch.full((len(rows), 1), token),
                attention_mask=attention,
                position_ids=(position + step)[:, None],
                cache=cache,
                use_cache=True,
            )
            got.append(out.logits[:, -1])
    for row, pruned in enumerate(ALL):
        want = uncached_logits(with_replaced_layers(slm, adapters, pruned), [*rows[row], *extra])[-4:]
        torch.testing.assert_close(torch.stack([g[row] for g in got]), want, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("pruned", [(0,), (0, 1), (3,), (0, 1, 2, 3), (1, 2)])
def test_transformers_own_generate_works_in_the_context_with_padding_and_without_position_ids(slm, pruned):
    adapters = random_adapters(L, sink=True)
    rows = prompts(3)
    batch = slm.tokenizer.pad({"input_ids": [list(p) for p in rows]}, return_tensors="pt")
    with LayerPruner(slm, adapters) as pruner:
        pruner.prune(list(pruned))
        out = slm.generate(**batch, max_new_tokens=6, do_sample=False, pad_token_id=256)
    for row, prompt in enumerate(rows):
        want, _ = plain_greedy(slm, adapters, prompt, pruned, 6)
        got = out[row, batch["input_ids"].shape[1] :].tolist()
        assert [t for t in got if t != 256] == want


def test_mixed_batches_with_and_without_drafts_say_what_single_rows_say(slm):
    adapters = random_adapters(L, sink=True)
    rows = prompts(len(ALL))
    want = [plain_greedy(slm, adapters, p, c, 8) for p, c in zip(rows, ALL, strict=True)]
    other = [tuple(plain_greedy(slm, adapters, p, (), 8)[0]) for p in rows]
    drafts = {
        "none": [()] * len(rows),
        "of another configuration": [(o,) for o in other],
        "right": [(tuple(w),) for w, t in want],
        "partly right": [((*w[: i % 4], 7, 8, 9),) for i, (w, _) in enumerate(want)],
    }
    for name, given in drafts.items():
        requests = [Request(p, c, 8, d) for p, c, d in zip(rows, ALL, given, strict=True)]
        with LayerPruner(slm, adapters) as pruner:
            got = dict(generate_all(slm, pruner, requests, batch_size=6))
        assert [(list(got[i].token_ids), got[i].truncated) for i in range(len(rows))] == want, name
        if name == "right":
            assert all(got[i].accepted == len(got[i].token_ids) for i in got)


def stopping_at_each(slm: SLM, step: int, limit: int) -> tuple[AdapterStack, list, list]:
    """Adapters, a prompt for each configuration, and what each says alone where every so many tokens stop it."""
    slm.model.generation_config.eos_token_id = list(range(0, 257, step))
    adapters, rows = random_adapters(L, sink=True), prompts(len(ALL))
    want = [plain_greedy(slm, adapters, p, c, limit) for p, c in zip(rows, ALL, strict=True)]
    assert len({len(tokens) for tokens, _ in want}) > 1
    return adapters, rows, want


def test_rows_that_stop_early_leave_the_batch_and_the_others_go_on(slm):
    adapters, rows, want = stopping_at_each(slm, 3, 12)
    with LayerPruner(slm, adapters) as pruner:
        requests = [Request(p, c, 12) for p, c in zip(rows, ALL, strict=True)]
        got = in_order(generate_all(slm, pruner, requests, batch_size=len(rows)))
    assert [(list(g.token_ids), g.truncated) for g in got] == want


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_rows_that_join_a_running_batch_say_what_they_would_have_said_alone(slm, batch_size):
    adapters, rows, want = stopping_at_each(slm, 7, 12)
    # Drafts that agree for a while leave rejected tokens in the cache of a batch that goes on.
    drafts = [((*tokens[: i % 5], 1, 2), (9,)) for i, (tokens, _) in enumerate(want)]
    requests = [Request(p, c, 12, d) for p, c, d in zip(rows, ALL, drafts, strict=True)]
    with LayerPruner(slm, adapters) as pruner:
        got = in_order(generate_all(slm, pruner, requests, batch_size))
    assert [(list(c.token_ids), c.truncated) for c in got] == want


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_where_a_row_is_given_up_depends_neither_on_the_batch_nor_on_drafts(slm, batch_size):
    adapters, rows, want = stopping_at_each(slm, 9, 8)

    def give_up(said: tuple[int, ...]) -> bool:
        return sum(said) % 5 == 0 or len(said) == 6

    requests = [Request(p, c, 8, (tuple(tokens),), give_up) for p, c, (tokens, _) in zip(rows, ALL, want, strict=True)]
    with LayerPruner(slm, adapters) as pruner:
        got = in_order(generate_all(slm, pruner, requests, batch_size))
    for continuation, (tokens, truncated) in zip(got, want, strict=True):
        # Token by token: a row of the full length has reached its limit and is not asked about.
        asked = range(1, len(tokens) + (not truncated))
        end = next((end for end in asked if give_up(tuple(tokens[:end]))), None)
        assert continuation.cut == (end is not None)
        assert list(continuation.token_ids) == tokens[:end]


def test_requests_may_come_while_results_are_taken(slm):
    adapters = random_adapters(L, sink=True)
    rows = prompts(len(ALL))
    want = [plain_greedy(slm, adapters, p, c, 6)[0] for p, c in zip(rows, ALL, strict=True)]
    got = {}
    with LayerPruner(slm, adapters) as pruner:
        queue = GenerationQueue(slm, pruner, batch_size=4, states=PromptStates(0))
        queue.submit(0, Request(rows[0], ALL[0], 6))
        for key, continuation in queue:
            got[key] = list(continuation.token_ids)
            for new in (2 * key + 1, 2 * key + 2):
                if new < len(rows):
                    queue.submit(new, Request(rows[new], ALL[new], 6))
    assert [got[key] for key in range(len(rows))] == want


def test_a_row_that_is_given_up_ends_there_and_the_others_do_not(slm):
    adapters = random_adapters(L, sink=True)
    rows = prompts(4)
    want = [plain_greedy(slm, adapters, p, (1,), 8)[0] for p in rows]
    requests = [Request(p, (1,), 8, (), (lambda said: len(said) == 3) if i == 2 else None) for i, p in enumerate(rows)]
    with LayerPruner(slm, adapters) as pruner:
        got = in_order(generate_all(slm, pruner, requests, batch_size=4))
    assert [list(c.token_ids) for c in got] == [*want[:2], want[2][:3], want[3]]
    assert [c.cut for c in got] == [False, False, True, False]
    assert not got[2].truncated


def test_a_cache_that_reserves_room_holds_what_one_that_copies_holds():
    ours, theirs = ReservingCache(), DynamicCache()
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor([0, 2])
    for step, tokens in enumerate([5, 1, 1, 100, 1, 1]):
        keys, values = torch.randn(2, 3 if step < 2 else 2, 2, tokens, 4, generator=generator)
        for index in (0, 1):
            got, want = (cache.update(keys + index, values - index, index) for cache in (ours, theirs))
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert ours.get_seq_length() == theirs.get_seq_length()
        if step == 1:
            for cache in (ours, theirs):
                for layer in cache.layers:
                    layer.keys, layer.values = layer.keys[rows], layer.values[rows]


def test_drafts_do_no_harm_where_a_sliding_window_is_shorter_than_the_text(make_slm):
    slm = make_slm("mistral", sliding_window=8)
    adapters = random_adapters(L, sink=True)
    rows = prompts(4)
    with LayerPruner(slm, adapters) as pruner:
        plain = in_order(generate_all(slm, pruner, [Request(p, (0,), 8) for p in rows], 4))
        drafted = in_order(generate_all(slm, pruner, [Request(p, (0,), 8, ((1, 2, 3),)) for p in rows], 4))
    assert [c.token_ids for c in plain] == [c.token_ids for c in drafted]


def test_leaving_the_context_restores_the_model_bit_for_bit_even_after_an_error(slm):
    ids = torch.arange(20)[None]
    before, state = slm.model(input_ids=ids).logits, {k: v.clone() for k, v in slm.model.state_dict().items()}
    modules = [type(m) for m in slm.model.modules()]

    def prune_and_fail() -> None:
        with LayerPruner(slm, random_adapters(L, sink=True)) as pruner:
            pruner.prune([0, 2])
            assert not torch.equal(slm.model(input_ids=ids).logits, before)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        prune_and_fail()
    assert torch.equal(slm.model(input_ids=ids).logits, before)
    assert [type(m) for m in slm.model.modules()] == modules
    assert all(torch.equal(v, state[k]) for k, v in slm.model.state_dict().items())
    assert all("forward" not in vars(layer) for layer in slm.layers)


def test_pruned_layers_store_no_keys(slm):
    cache = DynamicCache()
    with LayerPruner(slm) as pruner:
        pruner.prune(torch.tensor([[True, True, False, False], [True, False, False, True]]))
        slm.model(input_ids=torch.arange(20).view(2, 10), cache=cache, use_cache=True)
    assert [layer.keys.shape[0] for layer in cache.layers[1:]] == [1, 2, 1]
    assert cache.layers[0].keys.numel() == 2 * 10


def test_hidden_states_recorded_by_transformers_are_those_of_the_pruned_pass(slm):
    with LayerPruner(slm) as pruner:
        pruner.prune([1])
        states = slm.model(input_ids=torch.arange(10)[None], output_hidden_states=True).hidden_states
    assert len(states) == L + 1
    assert torch.equal(states[1], states[2])
    assert not torch.equal(states[2], states[3])


@pytest.mark.parametrize(
    ("configuration", "sentence"),
    [
        ([0, 4], r"has layers 0 to 3, but \[4\]"),
        ([-1], r"has layers 0 to 3, but \[-1\]"),
        (torch.zeros(2, 5, dtype=torch.bool), r"needs \(batch, 4\)"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(make_slm, configuration, sentence):
    with pytest.raises(ValueError, match=sentence), LayerPruner(make_slm()) as pruner:
        pruner.prune(configuration)


def test_a_mask_for_another_batch_adapters_for_another_model_and_nesting_are_refused(make_slm):
    slm = make_slm()
    with LayerPruner(slm) as pruner:
        pruner.prune(torch.ones(3, L, dtype=torch.bool))
        with pytest.raises(ValueError, match="3 rows, but the batch has 1"):
            slm.model(input_ids=torch.arange(5)[None])
        with pytest.raises(ValueError, match="another LayerPruner"), LayerPruner(slm):
            pass
    with pytest.raises(ValueError, match="made for 3 layers of width 32"):
        LayerPruner(slm, AdapterStack(3, 32, 4))


@pytest.mark.parametrize("first", range(L))
def test_a_pass_that_starts_at_a_layer_with_its_known_input_ends_as_the_whole_pass_does(slm, first):
    adapters = random_adapters(L, sink=True)
    ids = torch.arange(20)[None]
    inputs = []
    with LayerPruner(slm, adapters) as pruner:
        pruner.prune([1])
        handle = slm.layers[first].register_forward_pre_hook(lambda m, a: inputs.append(a[0]))
        slm.model(input_ids=ids)
        handle.remove()
        pruner.prune(sorted({1, first}))
        want = slm.model(input_ids=ids).logits
        with starting_at(slm, first, inputs[0]):
            got = slm.model(input_ids=ids, use_cache=False).logits
        again = slm.model(input_ids=ids).logits
    assert torch.equal(got, want)
    assert torch.equal(again, want)


def test_a_batch_of_no_rows_is_refused(make_slm):
    slm = make_slm()
    with (
        LayerPruner(slm) as pruner,
        pytest.raises(ValueError, match=r"hardware.batch_size=0 leaves no row; allowed: at least 1"),
    ):
        GenerationQueue(slm, pruner, 0, PromptStates(0))
