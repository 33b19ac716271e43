import itertools

import pytest
import torch
from swapped import random_adapters, swapped, target_logits

from dynprune.baselines.static_search import accurate_static_sets, greedy_static_sets
from dynprune.slm.pruning import LayerPruner


def samples() -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randint(0, 250, (4 + 2 * i,), generator=generator).tolist(), torch.randint(0, 250, (2 + i % 3,)).tolist())
        for i in range(5)
    ]


def nats_per_token(slm, stack, pruned, data) -> float:
    """Sample by sample, without padding or sharing."""
    model = swapped(slm.model, stack, pruned)
    total, count = 0.0, 0
    for prompt, answer in data:
        target = [*answer, slm.tokenizer.eos_token_id]
        total -= target_logits(model, prompt, target).log_softmax(-1)[range(len(target)), target].sum().item()
        count += len(target)
    return total / count


def nats_alone(slm, stack, data) -> list[float]:
    tokens = sum(len(answer) + 1 for _, answer in data)
    return [tokens * nats_per_token(slm, stack, [layer], data) for layer in range(4)]


@pytest.mark.parametrize("tokens", [1, 25, 1000])
def test_each_step_adds_the_layer_that_hurts_the_likelihood_least(make_slm, tokens, monkeypatch):
    monkeypatch.setattr("dynprune.slm.likelihood.tokens_at_once", lambda slm: tokens)
    slm, stack, data = make_slm(), random_adapters(), samples()
    with LayerPruner(slm, stack) as pruner:
        found = list(greedy_static_sets(slm, pruner, data, nats_alone(slm, stack, data), 3, None))
    chosen: tuple[int, ...] = ()
    for layers, loss in found:
        losses = {
            candidate: nats_per_token(slm, stack, candidate, data)
            for candidate in itertools.combinations(range(4), len(chosen) + 1)
            if set(chosen) < set(candidate)
        }
        assert layers == min(losses, key=losses.get)
        assert loss == pytest.approx(losses[layers], rel=1e-4)
        chosen = layers


def test_impossible_sizes_and_missing_samples_are_refused(make_slm):
    slm = make_slm()
    with LayerPruner(slm) as pruner:
        with pytest.raises(ValueError, match="set of 5 layers"):
            next(greedy_static_sets(slm, pruner, samples(), [1.0] * 4, 5, None))
        with pytest.raises(ValueError, match="needs samples"):
            next(greedy_static_sets(slm, pruner, [], [0.0] * 4, 1, None))


def test_later_layers_come_from_the_candidates_that_hurt_least_alone(make_slm):
    slm, stack, data = make_slm(), random_adapters(), samples()
    alone_L = nats_alone(slm, stack, data)
    alone = sorted(range(4), key=lambda layer: alone_L[layer])
    with LayerPruner(slm, stack) as pruner:
        *_, (pair, _) = greedy_static_sets(slm, pruner, data, alone_L, 2, 2)
        with pytest.raises(ValueError, match=r"static_candidates=1 is fewer"):
            next(greedy_static_sets(slm, pruner, data, alone_L, 2, 1))
    assert set(pair) == set(alone[:2])


def next_tokens(slm, stack, pruned, prompts) -> torch.Tensor:
    """What follows each prompt in a swapped model, without padding or sharing."""
    return swapped(slm.model, stack, pruned)(input_ids=prompts, use_cache=False).logits[:, -1].argmax(-1)


@pytest.mark.parametrize(("finalists", "place"), [(1, 0), (2, 1), (4, 2)])
def test_of_the_likeliest_sets_the_most_accurate_is_taken(make_slm, finalists, place):
    slm, stack, data = make_slm(), random_adapters(), samples()
    prompts = torch.randint(0, 250, (600, 6), generator=torch.Generator().manual_seed(4))
    # Answers without a token, which are right where the stop token follows. This one follows more often without the second
    # likeliest layer than without the likeliest, and most often without the third: the number of finalists decides.
    slm.tokenizer.eos_token_id = 127
    every = [layers for size in (1, 2, 3) for layers in itertools.combinations(range(4), size)]
    right = {layers: next_tokens(slm, stack, layers, prompts) == 127 for layers in every}
    asked = (right[(0,)] | right[(1,)] | right[(2,)] | right[(3,)]).nonzero()[:, 0].tolist()
    validation = [(prompts[number].tolist(), []) for number in asked]
    with LayerPruner(slm, stack) as pruner:
        found = list(accurate_static_sets(slm, pruner, data, nats_alone(slm, stack, data), validation, 3, None, finalists))
    chosen: tuple[int, ...] = ()
    for layers, accuracy in found:
        options = [tuple(sorted([*chosen, layer])) for layer in range(4) if layer not in chosen]
        options = sorted(options, key=lambda option: nats_per_token(slm, stack, option, data))
        shares = [right[option][asked].double().mean().item() for option in options[:finalists]]
        assert layers == options[shares.index(max(shares))]
        assert accuracy == pytest.approx(max(shares))
        # Else the accuracy would decide nothing in this test.
        assert chosen or layers == options[place]
        chosen = layers


def test_among_equally_accurate_sets_the_likeliest_is_taken(make_slm):
    slm, stack, data = make_slm(), random_adapters(), samples()
    alone_L = nats_alone(slm, stack, data)
    with LayerPruner(slm, stack) as pruner:
        [(likeliest, _)] = greedy_static_sets(slm, pruner, data, alone_L, 1, None)
        # Nothing is right whatever is pruned: random weights do not give random answers.
        [(accurate, accuracy)] = accurate_static_sets(slm, pruner, data, alone_L, data, 1, None, 4)
    assert (accurate, accuracy) == (likeliest, 0.0)


def test_a_search_by_accuracy_without_finalists_is_refused(make_slm):
    slm = make_slm()
    with LayerPruner(slm) as pruner, pytest.raises(ValueError, match="finalists=0 tries no layer"):
        accurate_static_sets(slm, pruner, samples(), [0.0] * 4, samples(), 1, None, 0)
