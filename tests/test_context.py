import copy
import random
from collections import Counter
from functools import partial

import lightning
import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from swapped import swapped, target_logits

from dynprune.adapters.context import ContextBatch, ContextStream, ContextTraining, answer_kl, draw_configuration
from dynprune.adapters.stack import AdapterStack
from dynprune.data.datamodule import StreamData
from dynprune.slm.pruning import LayerPruner


def samples(n: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    rng = random.Random(0)
    return [
        (tuple(rng.randrange(250) for _ in range(4 + i % 5)), tuple(rng.randrange(250) for _ in range(2 + i % 3)))
        for i in range(n)
    ]


def test_the_kl_is_that_of_its_definition():
    rng = np.random.default_rng(0)
    teacher, student = rng.normal(size=(2, 5, 7))
    want = rel_entr(softmax(teacher, axis=1), softmax(student, axis=1)).sum(axis=1).mean()
    assert answer_kl(torch.tensor(teacher), torch.tensor(student)).item() == pytest.approx(want, rel=1e-9)


def test_sizes_are_drawn_alike_and_layers_by_their_weights():
    rng = random.Random(0)
    drawn = [draw_configuration([1.0, 3.0, 0.0, 1.0], 1, 3, rng) for _ in range(30_000)]
    assert all(list(c) == sorted(set(c)) and 2 not in c for c in drawn)
    sizes = Counter(map(len, drawn))
    assert all(sizes[size] == pytest.approx(10_000, rel=0.05) for size in (1, 2, 3))
    single = Counter(c[0] for c in drawn if len(c) == 1)
    assert single[1] / sizes[1] == pytest.approx(3 / 5, abs=0.02)
    # Without replacement: layer 1 first (3/5), or second after another one (2/5 · 3/4).
    both = Counter(1 in c for c in drawn if len(c) == 2)
    assert both[True] / sizes[2] == pytest.approx(3 / 5 + 2 / 5 * 3 / 4, abs=0.02)


@pytest.mark.parametrize(("smallest", "largest"), [(0, 2), (2, 1), (1, 4)])
def test_sizes_that_cannot_be_drawn_are_refused(smallest, largest):
    with pytest.raises(ValueError, match=r"adapter\.draw takes .* of 3 layers"):
        draw_configuration([1.0, 1.0, 0.0, 1.0], smallest, largest, random.Random(0))


def test_an_epoch_has_each_sample_once_under_a_configuration_of_its_own():
    data = samples(11)
    stream = ContextStream(data, partial(draw_configuration, [1.0] * 4, 1, 3), batch_size=4, seed=3)
    epochs = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        batches = list(stream)
        assert len(batches) == len(stream) == 3
        assert sorted(s for batch in batches for s in batch.samples) == sorted(data)
        assert all(len(batch.samples) == len(batch.configurations) for batch in batches)
        epochs.append(batches)
    assert epochs[0] == epochs[2] != epochs[1]


def test_the_loss_and_its_gradient_are_those_of_swapped_modules_sample_by_sample(make_slm):
    slm = make_slm()
    torch.manual_seed(1)
    stack = AdapterStack(4, 32, 4)
    for parameter in stack.parameters():
        parameter.data.normal_().mul_(0.3)
    data = samples(3)
    configurations = [(0, 2), (3,), (1, 2, 3)]
    oracle = copy.deepcopy(stack)
    total, tokens = torch.zeros(()), 0
    for (prompt, answer), configuration in zip(data, configurations, strict=True):
        target = [*answer, slm.tokenizer.eos_token_id]
        with torch.no_grad():
            log_p = target_logits(slm.model, prompt, target).log_softmax(-1)
        # The stack is not copied with the model: it gets the gradients.
        log_q = target_logits(swapped(slm.model, oracle, configuration), prompt, target).log_softmax(-1)
        total = total + (log_p.exp() * (log_p - log_q)).sum()
        tokens += len(log_p)
    (total / tokens).backward()
    with LayerPruner(slm, stack) as pruner:
        module = ContextTraining(slm, pruner, stack, partial(torch.optim.Adam, lr=1e-3), 0.0)
        module.log = lambda *args, **kwargs: None
        loss = module.training_step(ContextBatch(data, configurations), 0)
        loss.backward()
    assert loss.item() == pytest.approx((total / tokens).item(), rel=1e-4)
    for ours, want in zip(stack.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, want.grad, rtol=1e-3, atol=1e-6)
    assert all(parameter.grad is None for parameter in slm.model.parameters())


def test_training_lowers_the_held_out_kl_and_leaves_the_slm_as_it_is(make_slm, make_trainer):
    lightning.seed_everything(0)
    slm = make_slm()
    before = copy.deepcopy(slm.model.state_dict())
    stack = AdapterStack(4, 32, 16)
    data = StreamData(
        ContextStream(samples(40), partial(draw_configuration, [1.0] * 4, 1, 2), batch_size=8, seed=0),
        [ContextStream(samples(8), partial(draw_configuration, [1.0] * 4, 1, 2), batch_size=8, seed=0)],
    )
    trainer = make_trainer(25)
    with LayerPruner(slm, stack) as pruner:
        module = ContextTraining(slm, pruner, stack, partial(torch.optim.Adam, lr=1e-2), 0.1)
        [untrained] = trainer.validate(module, data, verbose=False)
        trainer.fit(module, data)
        [trained] = trainer.validate(module, data, verbose=False)
    assert trained["validation/kl"] < 0.7 * untrained["validation/kl"]
    assert all(torch.equal(value, before[name]) for name, value in slm.model.state_dict().items())
