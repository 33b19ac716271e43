"""What can be pruned is told from what cannot; every architecture of transformers is tried by ``make trust``."""

import pytest
from torch import nn
from trust.architectures import results, tiny_model

from dynprune.slm.loading import load_hf
from dynprune.slm.support import refusal


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "mixtral", "opt"])
def test_architectures_of_many_kinds_are_pruned_rightly(name):
    assert list(results([name])) == [(name, ("passed", ""))]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mamba", "layer 0 keeps no keys and values of its own"),
        ("deepseek_v32", "layer 0 keeps more than keys and values"),
        ("bert", "a token sees those after it, so it is no causal model"),
        ("bart", "a row that is padded on the left, in a batch with a longer one, does not say what it says alone"),
        ("openai-gpt", "its decoder layers return a list, not a tensor"),
        ("xlm", "needs a decoder-only model with exactly one"),
    ],
)
def test_what_cannot_be_pruned_is_refused_with_the_reason(name, reason):
    assert reason in refusal(tiny_model(name))


def test_states_that_go_around_layers_are_refused():
    model = tiny_model("llama")
    model.model.layers[2].register_forward_pre_hook(lambda layer, arguments: (arguments[0] + 1, *arguments[1:]))
    # A hook's change is seen by the layer, and by the hooks after it.
    assert refusal(model) == "what goes into layer 2 is not what layer 1 gives: states go around layers"


def test_layers_that_run_in_another_order_are_refused():
    model = tiny_model("llama")
    model.model.layers = nn.ModuleList([*model.model.layers[:3], model.model.layers[0]])
    model.config.num_hidden_layers = 4
    assert "not run once each" in refusal(model)


def test_a_model_is_refused_when_it_is_loaded(tmp_path):
    tiny_model("mamba").save_pretrained(tmp_path)
    from dynprune.slm.byte_tokenizer import byte_tokenizer

    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be pruned: layer 0 keeps no keys and values of its own: it has a recurrent"):
        load_hf(str(tmp_path), "float32")
