"""The stage ``adapt`` on a tiny random model."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import composed, dynprune

from dynprune.stages.adapt import adapt, longer_queries, usable_toolboxes
from dynprune.stages.run import Run


@pytest.mark.slow
def test_a_delta_is_trained_further_with_pruned_layers(tmp_path):
    options = ("experiment=tiny", "stage=adapt", "adapt.epochs=1", "adapt.rank=2", "adapt.alpha=4", "evaluation.max_queries=2")
    dynprune(tmp_path, *options, "name=first")
    [first] = (tmp_path / "outputs/artifacts/adapt").glob("*/adapter_model.safetensors")
    again = (*options, f"model.delta={first.parent}", "adapt.layer_dropout=0.8", "adapter.draw.max_layers=3")
    dynprune(tmp_path, *again, "adapter=ridge", "adapter.bottleneck=8", "name=again")
    [second] = [path for path in (tmp_path / "outputs/artifacts/adapt").glob("*/adapter_model.safetensors") if path != first]
    before, after = load_file(first), load_file(second)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert first.parent.name in (second.parent / "README.md").read_text()
    # A third training on fewer queries: what the delta was trained on before stays trained.
    dynprune(tmp_path, *options, f"model.delta={first.parent}", "data.only.max_chars=450", "name=third")
    known = [set(json.loads((path.parent / "functions.json").read_text())) for path in (first, second)]
    functions = [set(json.loads(p.read_text())) for p in (tmp_path / "outputs/artifacts/adapt").glob("*/functions.json")]
    assert len(functions) == 3
    assert all(known[0] <= trained for trained in functions)
    for wrong, sentence in (
        ("adapt.rank=3", "type adapt.rank=2 adapt.alpha=4"),
        ("adapt.targets=[q_proj]", "adapt.targets=['q_proj'] are not those of model.delta"),
    ):
        refused = dynprune(tmp_path, *again, wrong, check=False)
        assert refused.returncode != 0
        assert sentence in " ".join((refused.stdout + refused.stderr).split())


def run_of(folder, *overrides: str) -> Run:
    return Run(composed("experiment=tiny", "stage=adapt", f"paths.run={folder}/run", f"paths.artifacts={folder}/a", *overrides))


def test_longer_queries_are_of_functions_that_no_other_split_calls(tmp_path):
    options = ("data.source.categories=[live_multiple,simple_python]", "data.source.max_chars=1500")
    run = run_of(tmp_path, *options, "adapt.max_chars=2500")
    held_out = [query for name in ("train", "validation", "test") for query in run.splits[name]]
    longer = longer_queries(run)
    assert longer
    assert all(1500 < query.num_chars <= 2500 for query in longer)
    assert not {query.id for query in longer} & {query.id for members in run.splits.values() for query in members}
    assert not [query.id for query in held_out if query.functions & frozenset().union(*(q.functions for q in longer))]
    # What `data.only` leaves out of the other splits stays held out all the same.
    narrowed = longer_queries(run_of(tmp_path, *options, "adapt.max_chars=2500", "data.only.categories=[live_multiple]"))
    assert [query.id for query in narrowed] == [query.id for query in longer if query.category == "live_multiple"]
    assert longer_queries(run_of(tmp_path, *options)) == []
    for shortest, said in ((2500, "2500"), ("null", "null")):
        with pytest.raises(ValueError, match=rf"adapt\.max_chars=2500 adds no longer .+source\.max_chars is {said}"):
            longer_queries(run_of(tmp_path, f"data.source.max_chars={shortest}", "adapt.max_chars=2500"))


def test_templates_that_call_a_held_out_function_are_left_out(tmp_path, caplog):
    def toolbox(name: str) -> str:
        tool = {"name": name, "description": "", "parameters": {"type": "dict", "properties": {"n": {"type": "integer"}}}}
        query = {"text": "{n}!", "calls": [{"name": name, "arguments": {"n": "{n}"}}]}
        return json.dumps({"tools": [tool], "values": {"n": [1, 2]}, "queries": [query]})

    held_out = next(iter(run_of(tmp_path).splits["test"][0].functions))
    path = tmp_path / "templates.jsonl"
    path.write_text("\n".join(map(toolbox, ("mine", held_out))))
    with caplog.at_level("WARNING"):
        kept = usable_toolboxes(run_of(tmp_path, f"adapt.templates={path}"))
    assert [sorted(box.functions) for box in kept] == [["mine"]]
    assert "left out 1 sets of templates" in caplog.text
    with pytest.raises(ValueError, match=r"adapt\.template_share=1\.0 is not allowed; allowed: 0 to below 1"):
        adapt(run_of(tmp_path, "adapt.template_share=1.0"))
