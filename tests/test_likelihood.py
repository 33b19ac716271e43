import itertools

import pytest
import torch
from swapped import random_adapters, swapped, target_logits

from dynprune.adapters.stack import AdapterStack
from dynprune.slm.likelihood import AnswerBatch, estimate_configurations, score_configurations
from dynprune.slm.pruning import LayerPruner


def alone(slm, stack, pruned, sample) -> tuple[float, int, bool]:
    """One sample in a model whose layers were swapped: nats, tokens, and whether every answer token is the likeliest."""
    prompt, answer = sample
    target = [*answer, slm.tokenizer.eos_token_id]
    logits = target_logits(swapped(slm.model, stack, pruned), prompt, target)
    nats = -logits.log_softmax(-1)[range(len(target)), target].sum().item()
    return nats, len(target), logits.argmax(-1).tolist() == target


def greedy(slm, stack, pruned, prompt, length) -> list[int]:
    model = swapped(slm.model, stack, pruned)
    tokens = list(prompt)
    for _ in range(length):
        tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture
def stack() -> AdapterStack:
    return random_adapters()


@pytest.mark.parametrize(("limit", "sizes"), [(1, [1, 1, 1, 1, 1]), (33, [2, 2, 1]), (1000, [5])])
def test_every_configuration_on_every_sample_as_if_alone_in_a_swapped_model(make_slm, stack, limit, sizes, monkeypatch):
    # The samples have 6, 10, 14, 15 and 19 tokens with their stop tokens; padded, 33 take two of 10 and two of 15.
    monkeypatch.setattr("dynprune.slm.likelihood.tokens_at_once", lambda slm: limit / 4)
    slm = make_slm()
    generator = torch.Generator().manual_seed(0)
    samples = [
        (torch.randint(0, 250, (4 + 3 * i,), generator=generator).tolist(), torch.randint(0, 250, (1 + i % 3,)).tolist())
        for i in range(5)
    ]
    # All subsets, not in the order in which they are run, and one of them twice.
    configurations = [c for size in (2, 0, 4, 1, 3) for c in itertools.combinations(range(4), size)] + [(1, 2)]
    with LayerPruner(slm, stack) as pruner:
        found = list(score_configurations(slm, pruner, samples, configurations))
    assert sorted(position for positions, _ in found for position in positions) == list(range(5))
    assert [len(positions) for positions, _ in found] == sizes
    for positions, scores in found:
        for configuration, scored in zip(configurations, scores, strict=True):
            for row, position in enumerate(positions):
                nats, tokens, right = alone(slm, stack, configuration, samples[position])
                assert scored.nats_B[row].item() == pytest.approx(nats, rel=1e-4, abs=1e-4)
                assert scored.nats_per_token_B[row].item() == pytest.approx(nats / tokens, rel=1e-4, abs=1e-4)
                assert (scored.tokens_B[row], scored.right_B[row]) == (tokens, right)


@pytest.mark.parametrize("tokens", [1, 20, 50, 1000])
def test_estimates_of_all_configurations_are_those_of_one_sample_alone_in_a_swapped_model(make_slm, stack, tokens, monkeypatch):
    # Rows of a batch: one, one, three, all; the sample has 15 tokens, and a CPU would take all of them together.
    monkeypatch.setattr("dynprune.slm.likelihood.tokens_at_once", lambda slm: tokens)
    slm = make_slm()
    generator = torch.Generator().manual_seed(0)
    sample = tuple(torch.randint(0, 250, (length,), generator=generator).tolist() for length in (11, 4))
    configurations = [c for size in (2, 0, 4, 1, 3) for c in itertools.combinations(range(4), size)] + [(1, 2)]
    with LayerPruner(slm, stack) as pruner:
        found = estimate_configurations(slm, pruner, sample, configurations)
    assert len(found) == 17
    for configuration, nats in zip(configurations, found, strict=True):
        want, count, _ = alone(slm, stack, configuration, sample)
        assert nats == pytest.approx(want / count, rel=1e-4, abs=1e-4)


def test_estimates_run_each_branch_of_the_configurations_once(make_slm, stack, monkeypatch):
    monkeypatch.setattr("dynprune.slm.likelihood.tokens_at_once", lambda slm: 1)
    slm, runs = make_slm(), [0] * 4
    # A hook is called for layers that are left out too: what counts is the attention.
    for index, layer in enumerate(slm.layers):
        layer.self_attn.register_forward_hook(lambda *_, index=index: runs.__setitem__(index, runs[index] + 1))
    every = [c for size in range(5) for c in itertools.combinations(range(4), size)]
    with LayerPruner(slm, stack) as pruner:
        estimate_configurations(slm, pruner, ([5, 17, 80], [9]), every)
    # Layer i is kept under one choice for each way to prune the layers below it.
    assert runs == [1, 2, 4, 8]


def test_estimates_leave_the_choice_of_layers_as_it_was(make_slm, stack):
    slm, ids = make_slm(), torch.tensor([[3, 4, 5], [6, 7, 8]])
    with LayerPruner(slm, stack) as pruner:
        pruner.prune(torch.tensor([[True, False, False, True], [False, True, False, False]]))
        before = slm.model(input_ids=ids, use_cache=False).logits
        estimate_configurations(slm, pruner, ([5, 17, 80], [9]), [(), (2,)])
        assert torch.equal(slm.model(input_ids=ids, use_cache=False).logits, before)


def test_an_answer_is_right_where_greedy_decoding_gives_it(make_slm, stack):
    slm = make_slm()
    prompt = [5, 17, 80, 33]
    answer = greedy(slm, stack, (1,), prompt, 3)
    # The stop token belongs to the answer: make the model's fourth token stand for it.
    slm.tokenizer.eos_token_id = greedy(slm, stack, (1,), prompt, 4)[-1]
    wrong = [*answer[:-1], (answer[-1] + 1) % 250]
    with LayerPruner(slm, stack) as pruner:
        pruner.prune((1,))
        _, scores = AnswerBatch(slm, [(prompt, answer), (prompt, wrong)]).run(slm)
    assert scores.right_B.tolist() == [True, False]
