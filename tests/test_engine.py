import itertools
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest
from swapped import random_adapters, swapped, target_logits

from dynprune.adapters.stack import AdapterStack
from dynprune.data.prompts import answer_tokens, prompt_tokens, render_answer, render_prompt
from dynprune.data.rollouts import Likelihood, Rollout
from dynprune.data.tasks import Query
from dynprune.exploration.beam import BeamSearch
from dynprune.exploration.dfs import DepthFirstSearch
from dynprune.exploration.engine import Step, explore
from dynprune.exploration.mcts import MonteCarloTreeSearch
from dynprune.exploration.random_search import RandomSearch
from dynprune.exploration.strategy import Estimate, Generate
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


def generated(slm, stack: AdapterStack, query: Query, pruned: Sequence[int], limit: int) -> str:
    """What transformers itself generates with the layers swapped for their adapters, without a cache."""
    model = swapped(slm.model, stack, pruned)
    ids = slm.tokenizer(render_prompt(slm.tokenizer, query), return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=limit, do_sample=False, use_cache=False, pad_token_id=0)
    return slm.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def length_score(output: str, query: Query) -> float:
    return float(sum(map(ord, output)) % 7)


def run(
    slm, n: int, strategy, batch_size: int, seed: int = 0, shared_bytes: int = 1 << 20, estimate_all: bool = False
) -> dict[str, list]:
    with LayerPruner(slm, random_adapters()) as pruner:
        steps = list(
            explore(slm, pruner, queries(n), strategy, length_score, None, 0.25, batch_size, shared_bytes, seed, estimate_all)
        )
    return ended(steps)


def ended(steps: Iterable[Step]) -> dict[str, list]:
    found = [step.ended for step in steps if step.ended is not None]
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
            output = generated(slm, random_adapters(), query, rollout.pruned_layers, limit)
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
        first = yield Generate(((0,), (1,), (2, 3)))
        second = yield Generate(((0, 1),))
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
    with LayerPruner(slm, random_adapters()) as pruner:
        whole, cut = (
            {r.id + str(r.pruned_layers): r for step in results for r in step.ended or ()}
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


def nats_per_token(slm, query: Query, pruned: Sequence[int]) -> float:
    """Of the reference answer, in a model whose layers were swapped, one sample at a time."""
    model = swapped(slm.model, random_adapters(), pruned)
    prompt, answer = prompt_tokens(slm.tokenizer, query), [*answer_tokens(slm.tokenizer, query), slm.tokenizer.eos_token_id]
    return -target_logits(model, prompt, answer).log_softmax(-1)[range(len(answer)), answer].mean().item()


class Alternating:
    """Generates and estimates in turns, some configurations first the one way and some first the other."""

    def __init__(self) -> None:
        self.sent: dict[float, list[list[float]]] = {}

    def propose(self, num_layers: int, rng: random.Random):
        key = rng.random()
        self.sent[key] = []
        for proposal in (
            Generate(((),)),
            Estimate(((2,), (0, 3), ())),
            Generate(((2,), (1,))),
            Estimate(((1,), (0, 1, 2, 3))),
            Estimate(((3,),)),
            Generate(((0, 3), (0, 2))),
        ):
            self.sent[key].append(list((yield proposal)))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_searches_that_generate_and_estimate_in_turns_get_what_each_configuration_is_worth_alone(make_slm, batch_size):
    slm, strategy = make_slm(), Alternating()
    found = run(slm, 4, strategy, batch_size)
    plain = RandomSearch(configurations_per_size=6, stop_below=-1, first_excluded=0, last_excluded=0)
    outputs = {(r.id, r.pruned_layers): (r.score, r.output) for rollouts in run(slm, 4, plain, 16).values() for r in rollouts}
    assert set(found) == {f"q{i}" for i in range(4)}
    sent = set()
    for query in queries(4):
        tried = {one.pruned_layers: one for one in found[query.id]}
        assert list(tried) == [(), (2,), (0, 3), (1,), (0, 1, 2, 3), (3,), (0, 2)]
        assert [type(one) for one in tried.values()] == [Rollout] * 4 + [Likelihood] * 2 + [Rollout]
        for configuration, one in tried.items():
            if isinstance(one, Rollout):
                assert (one.score, one.output) == outputs[query.id, configuration]
            if configuration == (0, 2):
                assert one.nats_per_token is None
            else:
                assert one.nats_per_token == pytest.approx(nats_per_token(slm, query, configuration), rel=1e-4)
        sent.add(
            tuple(
                tuple(getattr(tried[configuration], name) for configuration in configurations)
                for name, configurations in (
                    ("score", [()]),
                    ("nats_per_token", [(2,), (0, 3), ()]),
                    ("score", [(2,), (1,)]),
                    ("nats_per_token", [(1,), (0, 1, 2, 3)]),
                    ("nats_per_token", [(3,)]),
                    ("score", [(0, 3), (0, 2)]),
                )
            )
        )
    assert {tuple(map(tuple, batches)) for batches in strategy.sent.values()} == sent


@pytest.mark.parametrize(
    "strategy", [BeamSearch(width=2, depth=3, candidates=2, max_estimates=9), MonteCarloTreeSearch(depth=3, max_estimates=9)]
)
def test_a_guided_search_in_the_engine_keeps_every_estimate_and_the_scores_of_the_best(make_slm, strategy):
    slm = make_slm()
    found = run(slm, 5, strategy, batch_size=4)
    for query in queries(5):
        tried = {one.pruned_layers: one for one in found[query.id]}
        assert len(tried) == len(found[query.id]) == 9
        for configuration, one in tried.items():
            assert one.nats_per_token == pytest.approx(nats_per_token(slm, query, configuration), rel=1e-4)
        for size in range(1, 4):
            of_size = sorted((one for c, one in tried.items() if len(c) == size), key=lambda one: one.nats_per_token)
            assert all(isinstance(one, Rollout) == (place < strategy.confirmed) for place, one in enumerate(of_size))


def test_estimate_all_adds_the_dense_reward_to_every_rollout_and_changes_nothing_else(make_slm):
    slm, strategy = make_slm(), RandomSearch(configurations_per_size=2, stop_below=-1, first_excluded=0, last_excluded=0)
    plain = run(slm, 3, strategy, 8)
    found = run(slm, 3, strategy, 8, estimate_all=True)
    assert {key: [replace(r, nats_per_token=None) for r in rollouts] for key, rollouts in found.items()} == plain
    for query in queries(3):
        for rollout in found[query.id]:
            assert rollout.nats_per_token == pytest.approx(nats_per_token(slm, query, rollout.pruned_layers), rel=1e-4)


def test_a_search_that_estimates_does_not_wait_for_all_that_only_generate(make_slm):
    ended: list[int] = []

    class OneEstimates:
        def propose(self, num_layers: int, rng: random.Random):
            return self.search(next(numbers))

        def search(self, number: int):
            yield Generate(((),))
            for layer in range(4):
                if number == 0 and layer < 2:
                    yield Estimate(((layer,),))
                yield Generate(((layer,),))
            ended.append(number)

    numbers = itertools.count()
    run(make_slm(), 30, OneEstimates(), batch_size=4)
    assert ended.index(0) < 15


def test_generations_do_not_wait_for_the_estimates_of_all_searches(make_slm):
    happened: list[str] = []

    class Noting:
        def propose(self, num_layers: int, rng: random.Random):
            return self.search()

        def search(self):
            yield Generate(((),))
            yield Estimate(((0,),))
            happened.append("estimate")
            yield Generate(tuple(itertools.combinations(range(4), 2)))
            happened.append("end")

    run(make_slm(), 12, Noting(), batch_size=8)
    # Ten searches are in flight at the start.
    assert happened.index("end") <= 5


def test_a_search_that_estimates_ends_before_the_next_one_begins_to(make_slm):
    # So that searches end one after another, and their rollouts are there for others to learn from.
    made: list[int] = []

    class Noting:
        def propose(self, num_layers: int, rng: random.Random):
            return self.search(next(numbers))

        def search(self, number: int):
            yield Generate(((),))
            for layer in range(3):
                yield Estimate(((layer,),))
                made.append(number)

    numbers = itertools.count()
    run(make_slm(), 10, Noting(), batch_size=4)
    assert [number for number, _ in itertools.groupby(made)] == list(dict.fromkeys(made))


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
        want = generated(slm, random_adapters(), by_id[rollout.id], rollout.pruned_layers, limits[rollout.id])
        assert rollout.output == want, rollout


@pytest.mark.parametrize(
    ("strategy", "estimate_all"),
    [
        (Alternating(), False),
        (Alternating(), True),
        (BeamSearch(width=2, depth=3, candidates=2, max_estimates=9), False),
        (MonteCarloTreeSearch(depth=3, max_estimates=9), False),
        (DepthFirstSearch(max_scenarios=9, require_success=None), True),
    ],
)
@pytest.mark.parametrize("stop_after", [1, 9, 25, 1000])
def test_an_exploration_that_was_stopped_anywhere_goes_on_with_what_it_had_found(make_slm, stop_after, strategy, estimate_all):
    def lost(output: str, query: Query) -> bool:
        return len(output) > 1 and ord(output[1]) % 5 == 0

    def score(output: str, query: Query) -> float:
        return 0.0 if lost(output, query) else length_score(output, query)

    slm = make_slm()
    arguments = (queries(4), strategy, score, lost, 0.25, 3, 1 << 20, 0, estimate_all)
    with LayerPruner(slm, random_adapters()) as pruner:
        whole = ended(explore(slm, pruner, *arguments))
        first = [one for step in itertools.islice(explore(slm, pruner, *arguments), stop_after) for one in step.new]
        steps = list(explore(slm, pruner, *arguments, earlier=first))
    then = [one for step in steps for one in step.new]
    assert ended(steps) == whole
    # Each configuration generated once and estimated once, whichever attempt did it.
    kinds = [(one.id, one.pruned_layers, type(one)) for one in [*first, *then]]
    assert len(set(kinds)) == len(kinds)
    assert len(kinds) == sum(isinstance(one, Rollout) + (one.nats_per_token is not None) for r in whole.values() for one in r)
    assert (then == []) == (stop_after == 1000)
