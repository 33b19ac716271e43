"""The stage ``adapt`` on a tiny random model."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import dynprune


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
