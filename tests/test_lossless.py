from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from dynprune.data.prompts import prompt_tokens
from dynprune.data.tasks import Query
from dynprune.evaluation.accuracy import Asked, run_queries
from dynprune.evaluation.latency import TimedRow, time_rows
from dynprune.evaluation.lossless import count_differences, run_lossless
from dynprune.slm.cache import ReservingCache
from dynprune.slm.decoding import decode_pruned
from dynprune.slm.pruning import LayerPruner
from dynprune.slm.speculative import Drafting
from dynprune.stages.lossless import lossless_rows, timed_row
from dynprune.stages.rows import Row

DRAFTING = Drafting(lookup=True, draft_tokens=3, min_probability=0.0)
TOOL = {"name": "f", "description": "Does it.", "parameters": {"type": "dict", "properties": {"x": {"type": "integer"}}}}


def queries(n: int) -> list[Query]:
    return [
        Query(
            id=str(number),
            category="simple",
            messages=({"role": "user", "content": f"Call f with x = {number}."},),
            tools=(TOOL,),
            answers=({"name": "f", "arguments": {"x": number}},),
            allowed=({"f": {"x": [number]}},),
        )
        for number in range(n)
    ]


def originals(slm, asked):
    with LayerPruner(slm) as pruner:
        found = {s.id: s for s in run_queries(slm, pruner, [Asked(query, ((),)) for query in asked], 10, 2, 0)}
    return [found[query.id] for query in asked]


def lossless(slm, asked):
    with LayerPruner(slm) as pruner:
        return list(run_lossless(slm, pruner, asked, [(1,)] * len(asked), 10, DRAFTING))


def test_lossless_samples_are_the_full_slms_and_say_what_drafts_did(make_slm):
    slm, asked = make_slm(), queries(4)
    want, got = originals(slm, asked), lossless(slm, asked)
    assert [replace(sample, drafts={}) for sample in got] == want
    for sample in got:
        assert set(sample.drafts) == {"passes", "draft_passes", "proposed", "accepted"}
        assert sample.drafts["passes"] >= 1
        assert sample.drafts["accepted"] <= sample.drafts["proposed"]
    with LayerPruner(slm) as pruner:
        assert count_differences(slm, pruner, asked, got, want) == (0, 0)


def test_another_answer_is_counted_apart_where_rounding_explains_it_and_named_elsewhere(make_slm, caplog):
    slm, asked = make_slm(), queries(3)
    head = slm.model.lm_head.weight
    want = originals(slm, asked)
    said = want[1].token_ids
    twin = next(token for token in range(250) if token > said[4] and all(token not in sample.token_ids for sample in want))
    changed = replace(want[1], token_ids=(*said[:4], twin))
    samples = [want[0], changed, want[2]]
    with LayerPruner(slm) as pruner:
        assert count_differences(slm, pruner, asked, samples, want) == (0, 1)
    assert "changed the answer to query 1 " in caplog.text
    head[twin] = head[said[4]]
    with LayerPruner(slm) as pruner:
        assert count_differences(slm, pruner, asked, samples, want) == (1, 0)


def test_a_row_is_timed_by_its_own_way_of_decoding_with_what_its_chooser_says(make_slm):
    slm, asked = make_slm(), queries(2)
    prompts, seen = [prompt_tokens(slm.tokenizer, query) for query in asked], []

    def decode(slm, pruner, prompt, configuration, new_tokens, cache):
        seen.append((tuple(prompt), configuration, new_tokens))
        yield from decode_pruned(slm, pruner, prompt, configuration, new_tokens, cache)

    rows = {
        "original": TimedRow(lambda query: ()),
        "own": TimedRow(lambda query: (int(query.id),), decode),
        "lossless": timed_row(Row("lossless", lambda query: (0, 1), "", drafting=DRAFTING)),
    }
    with LayerPruner(slm) as pruner:
        timings = list(time_rows(slm, pruner, asked, prompts, [7, 1], rows, warmup=0, seed=0))
    assert sorted((t.row, t.id, t.tokens) for t in timings) == [
        (row, query.id, tokens) for row in ("lossless", "original", "own") for query, tokens in zip(asked, (7, 1), strict=True)
    ]
    assert sorted(seen) == sorted([(prompts[0], (0,), 7), (prompts[1], (1,), 1)])
    size = {(t.row, t.id): t.cache_bytes for t in timings}
    for query in asked:
        # A lossless row ends with the keys and values of the full SLM, a pruned one without those of its layer.
        assert size["lossless", query.id] == size["original", query.id] > size["own", query.id]


def test_rows_that_take_turns_pass_by_pass_say_what_each_says_alone(make_slm):
    slm, [query] = make_slm(), queries(1)
    prompt, said = prompt_tokens(slm.tokenizer, query), {}

    def collecting(configuration):
        def decode(*arguments):
            for token in decode_pruned(*arguments):
                said.setdefault(configuration, []).append(int(token))
                yield token

        return TimedRow(lambda query: configuration, decode)

    configurations = [(), (0,), (1, 3), (0, 1, 2)]
    rows = {str(configuration): collecting(configuration) for configuration in configurations}
    with LayerPruner(slm) as pruner:
        list(time_rows(slm, pruner, [query], [prompt], [12], rows, warmup=0, seed=0))
        alone = {c: [int(t) for t in decode_pruned(slm, pruner, prompt, c, 12, ReservingCache())] for c in configurations}
    assert said == alone
    assert len({tuple(tokens) for tokens in alone.values()}) == len(configurations)


def test_decoding_under_a_configuration_yields_what_transformers_generates(make_slm):
    slm = make_slm()
    slm.model.generation_config.eos_token_id = slm.tokenizer.eos_token = None
    ids = torch.tensor([[5, 6, 7, 8]])
    for configuration in [(), (0,), (1, 2)]:
        with LayerPruner(slm) as pruner:
            got = [int(t) for t in decode_pruned(slm, pruner, [5, 6, 7, 8], configuration, 9, ReservingCache())]
            pruner.prune(configuration)
            out = slm.generate(input_ids=ids, attention_mask=ids > 0, max_new_tokens=9, do_sample=False, pad_token_id=256)
        assert got == out[0, 4:].tolist()


ROWS = [
    Row("original", lambda query: (), "[]"),
    Row("static-2", lambda query: (1, 2), "[1, 2]", curve="static"),
    Row("router-dpo", lambda query: (3,), "abc", router_layers=1.0, curve="router-dpo", seed=1, timed=False),
]


def rows_of(**settings) -> list[Row]:
    defaults = {"pruned_layers": None, "lookup": True, "draft_tokens": 5, "min_probability": 0.5}
    config = OmegaConf.create({"evaluation": {"lossless": {name: defaults | s for name, s in settings.items()}}})
    return lossless_rows(SimpleNamespace(config=config), ROWS)


def test_rows_draft_with_look_up_with_layers_or_with_what_another_row_chooses():
    rows = rows_of(
        lookup={},
        deep={"pruned_layers": [3, 1, 1], "lookup": False},
        static={"pruned_layers": "static-2"},
        router={"pruned_layers": "router-dpo", "draft_tokens": 2},
    )
    assert [row.name for row in rows] == ["lossless-lookup", "lossless-deep", "lossless-static", "lossless-router"]
    assert [tuple(row.choose(None)) for row in rows] == [(), (1, 3), (1, 2), (3,)]
    assert [row.router_layers for row in rows] == [0, 0, 0, 1]
    # They have the original's answers, so they are points of no other method's curve, and each is timed.
    assert all(row.curve is None and row.seed is None and row.timed for row in rows)
    assert [row.drafting.lookup for row in rows] == [True, False, True, True]
    assert [row.drafting.draft_tokens for row in rows] == [5, 5, 5, 2]
    # What a row is made from identifies its artifact.
    assert len({row.origin for row in rows}) == 4
    assert rows_of(a={})[0].origin == rows_of(b={})[0].origin != rows_of(a={"min_probability": 0.1})[0].origin


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"lookup": False}, r"evaluation.lossless.x has nothing that drafts; set evaluation.lossless.x.lookup=true"),
        ({"pruned_layers": []} | {"lookup": False}, r"evaluation.lossless.x has nothing that drafts"),
        (
            {"pruned_layers": "static-9"},
            r"evaluation.lossless.x.pruned_layers=static-9 is no row of the table; .* static-2, router-dpo",
        ),
        ({"pruned_layers": "original"}, r"pruned_layers=original is no row"),
        ({"draft_tokens": 0}, r"evaluation.lossless: draft_tokens=0 drafts nothing"),
    ],
)
def test_settings_that_draft_nothing_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        rows_of(x=settings)
