"""What a router can read beside the query's text: nothing, or the SLM's own first layers."""

import copy
import json
from pathlib import Path

import pytest
import torch
from tiny import composed

from dynprune.data.prompts import render_prompt
from dynprune.data.tasks import Query
from dynprune.router.checkpoint import load_router, save_router
from dynprune.router.constant import ConstantEncoder
from dynprune.router.encoder import Encoder, TextEncoder
from dynprune.router.encoders import build_encoder
from dynprune.router.inputs import RouterInputs
from dynprune.router.policies import ConditionalBernoulliPolicy
from dynprune.router.router import Router
from dynprune.router.slm_states import SlmStatesEncoder
from dynprune.slm.loading import SLM
from dynprune.slm.pruning import LayerPruner
from dynprune.stages.router import new_router
from dynprune.stages.run import Run


def query(words: str) -> Query:
    tool = {"name": "add", "description": "adds", "parameters": {"type": "dict", "properties": {"a": {"type": "integer"}}}}
    return Query(id=words, messages=({"role": "user", "content": words},), tools=(tool,), answers=(), allowed=(), category="")


WORDS = ["Add 2 and 3", "What is the weather in Paris tomorrow?", "x"]


def embed(encoder: Encoder, queries: list[Query]) -> torch.Tensor:
    return encoder(**encoder.tokenize([encoder.render(query) for query in queries]))


@pytest.mark.parametrize("first_layers", [1, 3])
def test_the_states_are_the_unit_mean_over_the_prompt_of_what_transformers_calls_hidden_states(make_slm, first_layers) -> None:
    slm = make_slm()
    queries = [query(words) for words in WORDS]
    found = embed(SlmStatesEncoder(slm, first_layers), queries)
    assert found.shape == (3, slm.hidden_size)
    for row, each in zip(found, queries, strict=True):
        ids = slm.tokenizer(render_prompt(slm.tokenizer, each), add_special_tokens=False, return_tensors="pt").input_ids
        # Without the first token, which sees no query.
        mean = slm.model(ids, output_hidden_states=True).hidden_states[first_layers][0, 1:].mean(dim=0)
        torch.testing.assert_close(row, mean / mean.norm(), atol=1e-5, rtol=1e-4)


def test_the_layers_after_the_first_ones_are_not_run_and_the_slm_stays_as_it_was(make_slm) -> None:
    slm = make_slm()
    ran: list[int] = []
    handles = [layer.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(slm.layers)]
    embed(SlmStatesEncoder(slm, 2), [query("Add 2 and 3")])
    assert ran == [0, 1]
    ran.clear()
    slm.model(torch.tensor([[5, 6]]))
    assert ran == [0, 1, 2, 3]
    for handle in handles:
        handle.remove()


def test_a_pruner_with_nothing_pruned_changes_no_embedding(make_slm) -> None:
    slm = make_slm()
    encoder, queries = SlmStatesEncoder(slm, 2), [query(words) for words in WORDS]
    alone = embed(encoder, queries)
    with LayerPruner(slm) as pruner:
        pruner.prune(())
        assert torch.equal(embed(encoder, queries), alone)
        pruner.prune((0,))
        assert not torch.allclose(embed(encoder, queries), alone)


def test_the_slm_is_neither_a_parameter_nor_copied_nor_saved_with_the_router(make_slm, tmp_path: Path) -> None:
    slm = make_slm()
    router = Router(SlmStatesEncoder(slm, 2), num_layers=4, head_hidden_dim=8, num_counts=3).eval()
    assert not any(name.startswith("encoder") for name in router.state_dict())
    assert copy.deepcopy(router).encoder is router.encoder
    save_router(router, tmp_path / "router", {})
    loaded, _ = load_router(tmp_path / "router", slm)
    queries = [query(words) for words in WORDS]
    expected, found = router(embed(router.encoder, queries)), loaded(embed(loaded.encoder, queries))
    assert torch.equal(found.layer_logits_BL, expected.layer_logits_BL)
    assert torch.equal(found.ratio.logits_BK, expected.ratio.logits_BK)
    with pytest.raises(ValueError, match=r"reads the SLM's states; load it with the SLM"):
        load_router(tmp_path / "router")


@pytest.mark.parametrize("first_layers", [0, 4])
def test_a_number_of_first_layers_that_leaves_nothing_to_run_or_to_prune_is_refused(make_slm, first_layers) -> None:
    with pytest.raises(ValueError, match=rf"router\.slm_layers={first_layers} .*allowed: 1\.\.3"):
        SlmStatesEncoder(make_slm(), first_layers)


def test_without_input_every_query_gets_the_same_configuration_and_it_can_be_learnt(tmp_path: Path) -> None:
    torch.manual_seed(0)
    router, policy = Router(ConstantEncoder(), num_layers=6, head_hidden_dim=16, num_counts=7), ConditionalBernoulliPolicy(6)
    winner = torch.tensor([[True, False, False, True, False, False]])
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    for _ in range(100):
        loss = -policy.log_prob(router(embed(router.encoder, [query("Add")])), winner).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_router(router, tmp_path / "router", {})
    loaded, _ = load_router(tmp_path / "router")
    modes = policy.mode(loaded(embed(loaded.encoder, [query(words) for words in WORDS])))
    assert torch.equal(modes, winner.expand(3, 6))


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("kind", ["query", "none", "slm_states"])
def test_what_is_read_in_training_is_what_is_read_in_use(make_slm, kind: str, trainable: bool) -> None:
    slm: SLM = make_slm()
    text = {"name_or_path": "tiny:", "revision": None, "max_length": 64, "trainable": trainable}
    encoder = build_encoder(kind, {"query": text, "slm_states": {"first_layers": 2}}.get(kind, {}), slm)
    router = Router(encoder, num_layers=4, head_hidden_dim=8).eval()
    queries = [query(words) for words in WORDS]
    inputs = RouterInputs(router, {each.id: encoder.render(each) for each in queries}, batch_size=2)(WORDS)
    assert ("embedding_BE" in inputs) == (not encoder.trainable)
    embedding = inputs["embedding_BE"] if "embedding_BE" in inputs else router.encode(inputs)
    for row, each in zip(embedding, queries, strict=True):
        torch.testing.assert_close(row, embed(encoder, [each])[0], atol=1e-5, rtol=1e-4)


def test_an_unknown_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"router\.inputs='words' is unknown; allowed: query, slm_states, none"):
        build_encoder("words", {}, None)


def test_a_router_that_was_saved_before_there_was_a_choice_is_loaded(tmp_path: Path) -> None:
    router = Router(TextEncoder("tiny:", None, 64, False), num_layers=6, head_hidden_dim=16)
    save_router(router, tmp_path / "router", {})
    description = json.loads((tmp_path / "router/router.json").read_text())
    del description["inputs"], description["num_counts"]
    (tmp_path / "router/router.json").write_text(json.dumps(description))
    loaded, _ = load_router(tmp_path / "router")
    # The names of the thesis's heads.
    names = {name.split(".")[0] for name in loaded.state_dict() if not name.startswith("encoder.")}
    assert names == {"layers_hidden", "layers_score", "ratio_hidden", "ratio_mu", "ratio_log_std"}
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), router.parameters(), strict=True))


@pytest.mark.parametrize(
    ("typed", "dtype"),
    [
        ((), "bfloat16"),
        (("router.encoder.trainable=true",), "float32"),
        (("router.encoder.dtype=float16",), "float16"),
    ],
)
def test_a_frozen_encoder_has_the_slms_number_format_unless_told_otherwise(
    tmp_path: Path, typed: tuple[str, ...], dtype: str
) -> None:
    run = Run(composed("experiment=tiny", "model.dtype=bfloat16", f"paths.run={tmp_path}", *typed))
    assert run.encoder_settings["dtype"] == dtype
    assert new_router(run).encoder.arguments()["dtype"] == dtype
    # In float32 nothing has changed since there was no choice: routers of then are taken for its own.
    assert run.encoder_identity.get("dtype") == (None if dtype == "float32" else dtype)
