import random
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from swapped import StandIn, random_adapters
from torch.nn import functional

from dynprune.data.templates import Toolbox, fill
from dynprune.slm.adaptation import Adaptation, AnswerData, TokenisedAnswer, collate_families, new_delta, save_delta
from dynprune.slm.byte_tokenizer import byte_tokenizer
from dynprune.slm.likelihood import IGNORED
from dynprune.slm.loading import merge_delta, wrap_with_delta
from dynprune.slm.pruning import LayerPruner, configuration_mask

# Two with three tokens in common, of different lengths; one alone; two with nothing in common.
FAMILIES = [
    [TokenisedAnswer([5, 9, 30, 41, 7, 2], 2), TokenisedAnswer([5, 9, 30, 8, 12, 14, 60, 3, 2], 3)],
    [TokenisedAnswer([8, 60, 3], 1)],
    [TokenisedAnswer([7, 7, 90, 14], 3), TokenisedAnswer([9, 7, 3], 1)],
]
SAMPLES = [sample for samples in FAMILIES for sample in samples]


def alone(model, sample: TokenisedAnswer) -> tuple[torch.Tensor, int]:
    """Summed loss of one sample without padding."""
    logits = model(input_ids=torch.tensor([sample.ids]), use_cache=False).logits[0, -sample.num_answer_tokens - 1 : -1]
    return functional.cross_entropy(logits, torch.tensor(sample.ids[-sample.num_answer_tokens :]), reduction="sum"), len(logits)


def loss_of(model, prune) -> torch.Tensor:
    module = Adaptation(model, 1e-3, 0.0, prune)
    module.log = lambda *args, **kwargs: None
    return module.training_step(collate_families(FAMILIES, pad_id=0), 0)


def random_delta(make_slm, folder):
    """A delta that changes something, written to a folder."""
    model = new_delta(make_slm(), 2, 4, "all-linear")
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            # What bfloat16 holds exactly, since the file is in bfloat16.
            parameter.data = (torch.randn_like(parameter) * 0.3).bfloat16().float()
    save_delta(model, folder, frozenset())
    return folder


def test_a_family_is_a_row_in_which_each_sample_sees_itself_and_what_is_common():
    batch = collate_families(FAMILIES, pad_id=0)
    assert batch["input_ids"].shape == (3, 64)
    assert batch["seen"].shape == (3, 1, 64, 64)
    # What all begin with is there once, and the last token of a prompt never is.
    assert batch["input_ids"][0, :14].tolist() == [5, 9, 30, 41, 7, 2, 8, 12, 14, 60, 3, 2, 0, 0]
    for row, samples in enumerate(FAMILIES):
        labels = batch["labels"][row]
        assert labels[labels != IGNORED].tolist() == [token for s in samples for token in s.ids[-s.num_answer_tokens :]]
        ends = [index for index in range(64) if labels[index] != IGNORED and labels[index + 1] == IGNORED]
        assert len(ends) == len(samples)
        for sample, end in zip(samples, ends, strict=True):
            seen = batch["seen"][row, 0, end].nonzero().flatten()
            assert batch["input_ids"][row, seen].tolist() == sample.ids
            assert batch["position_ids"][row, seen].tolist() == list(range(len(sample.ids)))
    assert not batch["seen"].triu(1).any()


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss", "mistral"])
def test_training_goes_on_from_the_slm_with_its_delta(make_slm, tmp_path, architecture):
    # Two of these attend eagerly, whatever the others do.
    make_slm = partial(make_slm, architecture)
    folder = random_delta(make_slm, tmp_path / "delta")
    merged = merge_delta(make_slm().model, folder)
    losses = [alone(merged, sample) for sample in SAMPLES]
    want = sum(loss.item() for loss, _ in losses) / sum(count for _, count in losses)
    model = wrap_with_delta(make_slm().model, folder)
    loss = loss_of(model, lambda batch, size: None)
    assert loss.item() == pytest.approx(want, rel=1e-4)
    loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)


def test_with_pruned_layers_the_loss_and_its_gradient_are_those_of_swapped_modules(make_slm, tmp_path):
    folder = random_delta(make_slm, tmp_path / "delta")
    stack = random_adapters(sink=True)
    configurations = [(0, 2), (), (1, 3)]
    of_samples = [configuration for samples, configuration in zip(FAMILIES, configurations, strict=True) for _ in samples]

    oracle = wrap_with_delta(make_slm().model, folder)
    total, tokens = torch.zeros(()), 0
    for sample, configuration in zip(SAMPLES, of_samples, strict=True):
        layers = oracle.base_model.model.model.layers
        kept = {index: layers[index] for index in configuration}
        for index in configuration:
            layers[index] = StandIn(stack, index)
        loss, count = alone(oracle, sample)
        total, tokens = total + loss, tokens + count
        for index, layer in kept.items():
            layers[index] = layer
    (total / tokens).backward()

    slm = make_slm()
    model = wrap_with_delta(slm.model, folder)
    with LayerPruner(slm, stack) as pruner:
        loss = loss_of(model, lambda batch, size: pruner.prune(configuration_mask(slm, configurations[:size])))
        loss.backward()
    assert loss.item() == pytest.approx((total / tokens).item(), rel=1e-4)
    want = {name: parameter.grad for name, parameter in oracle.named_parameters() if "lora_" in name}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(parameter.grad, want[name], rtol=1e-3, atol=1e-6)


def test_a_sample_that_a_layer_cannot_see_whole_is_refused(make_slm, tmp_path):
    slm = make_slm("mistral")
    slm.model.config.sliding_window = 8
    model = new_delta(slm, 2, 4, "all-linear")
    with pytest.raises(ValueError, match=r"the last 8 tokens of a text, but prompt and answer of a query have 9.+max_chars"):
        loss_of(model, lambda batch, size: None)


def test_a_delta_comes_back_as_it_was_written(make_slm, tmp_path):
    folder = random_delta(make_slm, tmp_path / "delta")
    first = wrap_with_delta(make_slm().model, folder)
    save_delta(first, tmp_path / "again", frozenset())
    assert (folder / "adapter_model.safetensors").read_bytes() == (tmp_path / "again/adapter_model.safetensors").read_bytes()


def test_all_toolboxes_come_once_before_one_comes_again_and_an_epoch_is_drawn_alike_each_time():
    def toolbox(number: int) -> Toolbox:
        parameters = {"type": "dict", "properties": {"n": {"type": "integer"}}}
        tools = ({"name": f"f{number}", "description": "", "parameters": parameters},)
        queries = ({"text": f"box {number}: {{n}}", "calls": [{"name": f"f{number}", "arguments": {"n": "{n}"}}]},)
        return Toolbox(tools, {"n": {"range": [1, 99]}}, queries)

    split = [fill(toolbox(9), 0, random.Random(index)) for index in range(2)]
    tokenizer = byte_tokenizer()

    boxes = tuple(map(toolbox, range(5)))

    def data(toolboxes=boxes, families=None) -> AnswerData:
        return AnswerData(split, toolboxes, tokenizer, 0.5, 0.0, 0.0, families, 3, 2, 0)

    def texts(of: AnswerData, epoch: int) -> list[list[str]]:
        return [[tokenizer.decode(sample.ids) for sample in samples] for samples in of.families(epoch)]

    whole = data()
    epochs = [texts(whole, epoch) for epoch in range(5)]
    assert whole.families_in_epoch == 4
    # A training that goes on at its fourth epoch sees what it would have seen.
    assert texts(data(), 3) == epochs[3]
    # A query whose values are not swapped is asked once, a template as often as it is wanted.
    assert {tuple(map(len, epoch)) for epoch in epochs} == {(1, 1, 3, 3)}
    asked = [{re.search(r"box (\d)", text)[1] for text in family} for epoch in epochs for family in epoch[2:]]
    assert sorted(map(sorted, asked[:5])) == sorted(map(sorted, asked[5:])) == [[number] for number in "01234"]
    assert data(()).families_in_epoch == 2
    # Whatever is composed, the samples of a family have a prompt's tools and system messages in common.
    told = [replace(q, messages=({"role": "system", "content": f"Be {i}."}, *q.messages)) for i, q in enumerate(split)]
    composed = AnswerData([*split, *told], boxes, tokenizer, 0.5, 1.0, 1.0, 40, 4, 1, 0)
    for samples in composed.families(0):
        prompts = [tokenizer.decode(sample.ids[: -sample.num_answer_tokens]) for sample in samples]
        assert len({prompt.rpartition("user")[0] for prompt in prompts}) == 1
        assert len(set(prompts)) == len(prompts)
    single = data((), families=1)
    assert single.families_in_epoch == 1
    assert sorted(texts(single, epoch)[0] for epoch in range(2)) == sorted(epochs[0][:2])
