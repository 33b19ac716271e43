import copy
import math
import random
from collections.abc import Sequence

import pytest
import torch

from dynprune.adapters.stack import AdapterStack
from dynprune.data.prompts import render_answer, render_prompt
from dynprune.data.tasks import Query
from dynprune.exploration.engine import explore
from dynprune.exploration.random_search import RandomSearch
from dynprune.slm.pruning import LayerPruner


def queries(n: int) -> list[Query]:
    return [
        Query(
            id=f"q{i}",
            category="simple",
            messages=({"role": "user", "content": "x" * (3 * i + 1)},),
            tools=(),
            answers=({"name": f"f{i}", "arguments": {}},),
            allowed=(),
        )
        for i in range(n)
    ]


def adapters() -> AdapterStack:
    torch.manual_seed(1)
    stack = AdapterStack(4, 32, 4).requires_grad_(False)
    for parameter in stack.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    return stack


class Skip(torch.nn.Module):
    def __init__(self, stack: AdapterStack, index: int) -> None:
        super().__init__()
        self.stack, self.index = stack, index

    def forward(self, hidden, *args, **kwargs):
        return self.stack.layer(self.index, hidden)


def generated(slm, stack: AdapterStack, query: Query, pruned: Sequence[int], limit: int) -> str:
    """What transformers itself generates with the layers swapped for their adapters, without a cache."""
    model = copy.deepcopy(slm.model)
    for index in pruned:
        model.model.layers[index] = Skip(stack, index)
    ids = slm.tokenizer(render_prompt(slm.tokenizer, query), return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=limit, do_sample=False, use_cache=False, pad_token_id=0)
    return slm.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def length_score(output: str, query: Query) -> float:
    return float(sum(map(ord, output)) % 7)


def run(slm, n: int, strategy, batch_size: int, seed: int = 0, shared_bytes: int = 1 << 20, lost=None) -> dict[str, list]:
    with LayerPruner(slm, adapters()) as pruner:
        found = list(explore(slm, pruner, queries(n), strategy, length_score, lost, 0.25, batch_size, shared_bytes, seed))
    assert all(len({rollout.id for rollout in rollouts}) == 1 for rollouts in found)
    return {rollouts[0].id: rollouts for rollouts in found}


def test_every_rollout_is_what_plain_generation_of_its_configuration_says_and_scores(make_slm):
    slm = make_slm()
    strategy = RandomSearch(configurations_per_size=2, stop_below=-1, first_excluded=0, last_excluded=0)
    found = run(slm, 5, strategy, batch_size=7)
    assert set(found) == {f"q{i}" for i in range(5)}
    checked = 0
    for query in queries(5):
        for rollout in found[query.id]:
            limit = math.ceil(0.25 * (len(render_answer(query)) + 1))
            output = generated(slm, adapters(), query, rollout.pruned_layers, limit)
            assert rollout.output == output
            assert rollout.score == length_score(output, query)
            checked += 1
    assert checked >= 40


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_a_querys_search_depends_neither_on_the_batch_nor_on_the_other_queries(make_slm, batch_size):
    slm = make_slm()
    strategy = RandomSearch(configurations_per_size=2, stop_below=-1, first_excluded=1, last_excluded=0)
    all_of_them = run(slm, 4, strategy, batch_size=16)
    few = run(slm, 2, strategy, batch_size=batch_size)
    assert few == {id_: all_of_them[id_] for id_ in few}


def test_another_seed_searches_otherwise(make_slm):
    slm = make_slm(num_layers=4)
    strategy = RandomSearch(configurations_per_size=1, stop_below=-1, first_excluded=0, last_excluded=0)
    tried = [{r.pruned_layers for rs in run(slm, 4, strategy, 8, seed).values() for r in rs} for seed in (0, 1)]
    assert tried[0] != tried[1]


class Recording:
    """Proposes two batches and keeps what it is sent."""

    def __init__(self) -> None:
        self.sent: dict[float, list[float]] = {}

    def propose(self, num_layers: int, rng: random.Random):
        key = rng.random()
        first = yield ((0,), (1,), (2, 3))
        second = yield ((0, 1),)
        self.sent[key] = [*first, *second]


def test_a_strategy_is_sent_the_scores_of_its_own_batch_in_order(make_slm):
    strategy = Recording()
    found = run(make_slm(), 3, strategy, batch_size=2)
    assert sorted(strategy.sent.values()) == sorted([r.score for r in rollouts] for rollouts in found.values())
    for rollouts in found.values():
        assert [r.pruned_layers for r in rollouts] == [(0,), (1,), (2, 3), (0, 1)]


def test_outputs_are_cut_where_the_score_is_certain_and_the_scores_do_not_change(make_slm):
    def score(output: str, query: Query) -> float:
        return float(ord(output[1]) % 2) if len(output) > 1 else 0.0

    def lost(output: str, query: Query) -> bool:
        return len(output) > 1 and ord(output[1]) % 2 == 0

    slm, strategy = make_slm(), RandomSearch(configurations_per_size=4, stop_below=-1, first_excluded=0, last_excluded=0)
    with LayerPruner(slm, adapters()) as pruner:
        whole, cut = (
            {r.id + str(r.pruned_layers): r for found in results for r in found}
            for results in (
                explore(slm, pruner, queries(6), strategy, score, rule, 0.5, 8, 1 << 20, 0) for rule in (None, lost)
            )
        )
    assert whole.keys() == cut.keys()
    assert not any(rollout.cut for rollout in whole.values())
    assert 5 < sum(rollout.cut for rollout in cut.values()) < len(cut) - 5
    for key, rollout in cut.items():
        assert rollout.score == whole[key].score
        assert rollout.output == (whole[key].output[: len(rollout.output)] if rollout.cut else whole[key].output)
        assert not rollout.cut or rollout.score == 0


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_thousands_of_random_configurations_say_what_plain_generation_says(make_slm, architecture):
    slm = make_slm(architecture)
    strategy = RandomSearch(configurations_per_size=20, stop_below=-1, first_excluded=0, last_excluded=0)
    found = run(slm, 64, strategy, batch_size=32, shared_bytes=1 << 18)
    limits = {query.id: math.ceil(0.25 * (len(render_answer(query)) + 1)) for query in queries(64)}
    rollouts = [rollout for rollouts in found.values() for rollout in rollouts]
    assert len(rollouts) >= 1000
    by_id = {query.id: query for query in queries(64)}
    for rollout in rollouts:
        want = generated(slm, adapters(), by_id[rollout.id], rollout.pruned_layers, limits[rollout.id])
        assert rollout.output == want, rollout
