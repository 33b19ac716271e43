import itertools
import random

import pytest
import torch
from swapped import random_adapters

from dynprune.adapters.stack import AdapterStack
from dynprune.slm.prompt_states import PromptStates
from dynprune.slm.pruning import LayerPruner

L = 4


@pytest.fixture(params=["llama", "qwen3", "gemma3_text"])
def slm(request, make_slm):
    return make_slm(request.param, num_layers=L)


@pytest.fixture
def adapters() -> AdapterStack:
    return random_adapters(L)


def all_choices() -> list[tuple[bool, ...]]:
    return list(itertools.product([False, True], repeat=L))


def counted_layers(slm) -> list[int]:
    ran: list[int] = []
    for index, layer in enumerate(slm.layers):
        layer.self_attn.register_forward_hook(lambda *_, index=index: ran.append(index))
    return ran


def assert_same(got, want) -> None:
    for ours, theirs in zip(got, want, strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            assert (mine is None) == (other is None)
            if mine is not None:
                torch.testing.assert_close(mine.keys, other.keys, atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(mine.values, other.values, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("capacity", [0, 20_000, 1 << 30])
@pytest.mark.parametrize("at_once", [1, 10_000])
def test_shared_keys_and_values_are_those_of_a_prompt_run_alone(slm, adapters, monkeypatch, capacity, at_once):
    monkeypatch.setattr("dynprune.slm.prompt_states._TOKENS_AT_ONCE", {"cpu": at_once})
    generator = torch.Generator().manual_seed(0)
    texts = [tuple(torch.randint(0, 250, (n,), generator=generator).tolist()) for n in (9, 4, 1)]
    jobs = [(prompt, choices) for prompt in texts for choices in all_choices()]
    random.Random(0).shuffle(jobs)
    states = PromptStates(capacity)
    with LayerPruner(slm, adapters) as pruner:
        for start in range(0, len(jobs), 7):
            some = jobs[start : start + 7]
            got = states.run(slm, pruner, [prompt for prompt, _ in some], [choices for _, choices in some])
            want = [PromptStates(0).run(slm, pruner, [prompt], [choices])[0] for prompt, choices in some]
            assert_same(got, want)


def test_a_configuration_runs_only_the_layers_from_its_first_difference_on(slm, adapters):
    ran, prompt, states = counted_layers(slm), tuple(range(1, 9)), PromptStates(1 << 30)
    with LayerPruner(slm, adapters) as pruner:
        for pruned, expected in [((), [0, 1, 2, 3]), ((2,), [3]), ((1, 2), [3]), ((1,), [2, 3]), ((2,), []), ((2, 3), [])]:
            ran.clear()
            states.run(slm, pruner, [prompt], [tuple(layer in pruned for layer in range(L))])
            assert ran == expected, pruned


def test_another_prompt_shares_nothing(slm, adapters):
    ran, states = counted_layers(slm), PromptStates(1 << 30)
    with LayerPruner(slm, adapters) as pruner:
        states.run(slm, pruner, [(1, 2, 3)], [(False,) * L])
        ran.clear()
        states.run(slm, pruner, [(1, 2, 4)], [(False,) * L])
    assert ran == [0, 1, 2, 3]


def test_memory_stays_below_the_capacity_and_what_was_used_last_stays(slm, adapters):
    prompts = [tuple(range(n, n + 20)) for n in range(30)]
    full = (False,) * L
    with LayerPruner(slm, adapters) as pruner:
        one = PromptStates(1 << 30)
        one.run(slm, pruner, prompts[:1], [full])
        size = one.held_bytes
        states = PromptStates(3 * size)
        ran = counted_layers(slm)
        for prompt in prompts:
            states.run(slm, pruner, [prompt, prompts[0]], [full, full])
            assert states.held_bytes <= 3 * size
        ran.clear()
        states.run(slm, pruner, [prompts[0]], [full])
        assert ran == []
        states.run(slm, pruner, [prompts[5]], [full])
        assert ran == [0, 1, 2, 3]


def test_what_is_left_of_a_path_is_its_lower_part(slm, adapters):
    ran, full = counted_layers(slm), (False,) * L
    with LayerPruner(slm, adapters) as pruner:
        one = PromptStates(1 << 30)
        one.run(slm, pruner, [(1, 2, 3, 4)], [full])
        # Room for one path and a half: of the first prompt's the lower layers stay.
        states = PromptStates(one.held_bytes * 3 // 2)
        states.run(slm, pruner, [(1, 2, 3, 4)], [full])
        states.run(slm, pruner, [(5, 6, 7, 8)], [full])
        ran.clear()
        states.run(slm, pruner, [(1, 2, 3, 4)], [full])
    assert ran == [2, 3]


def test_negative_memory_is_refused():
    with pytest.raises(ValueError, match=r"hardware.shared_gib=-1 is negative; allowed: 0"):
        PromptStates(-(1 << 30))
