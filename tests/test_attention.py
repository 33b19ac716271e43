"""Folded attention against attention written out head by head, and whole models against transformers' eager attention."""

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dynprune.slm import attention
from dynprune.slm.attention import added_mask, folded_attention, prepare_attention
from dynprune.slm.loading import load_tiny


def head_by_head(query, key, value, mask, groups):
    batch, heads, tokens, width = query.shape
    out = torch.empty(batch, tokens, heads, value.shape[-1], dtype=query.dtype)
    for b in range(batch):
        for h in range(heads):
            scores = query[b, h] @ key[b, h // groups].T / math.sqrt(width)
            scores = scores.masked_fill(~mask[b % len(mask), 0], -torch.inf)
            out[b, :, h] = scores.softmax(dim=-1) @ value[b, h // groups]
    return out


def layer(groups: int) -> nn.Module:
    module = nn.Module()
    module.num_key_value_groups = groups
    module.is_causal = True
    return module


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 3),
    shared=st.integers(1, 3),
    groups=st.integers(1, 4),
    tokens=st.integers(1, 12),
    past=st.integers(0, 9),
    masked=st.booleans(),
    one_mask=st.booleans(),
    seed=st.integers(0, 99),
)
def test_it_is_attention_head_by_head(batch, shared, groups, tokens, past, masked, one_mask, seed):
    generator = torch.Generator().manual_seed(seed)
    length = tokens + past

    def draw(heads: int, size: int) -> torch.Tensor:
        return torch.randn(batch, heads, size, 8, generator=generator, dtype=torch.float64)

    query, key, value = draw(shared * groups, tokens), draw(shared, length), draw(shared, length)
    causal = torch.ones(tokens, length, dtype=torch.bool).tril(past)[None, None]
    padding = torch.rand(1 if one_mask else batch, 1, 1, length, generator=generator) < 0.7
    # Every token sees itself at least, whatever is padding.
    mask = (causal & padding) | torch.eye(length, dtype=torch.bool)[None, None, past:]
    if not masked:
        # Without a mask, several tokens are a whole text, and a single one sees all.
        whole = slice(length if tokens == 1 else tokens)
        key, value, mask = key[:, :, whole], value[:, :, whole], None
    got, weights = folded_attention(layer(groups), query, key, value, mask)
    seen = mask if masked else torch.ones(tokens, key.shape[2], dtype=torch.bool).tril(key.shape[2] - tokens)[None, None]
    torch.testing.assert_close(got, head_by_head(query, key, value, seen, groups))
    assert weights is None


def family(sizes: list[int]) -> torch.Tensor:
    """What samples see that have the first tokens in common, two rows of them."""
    parts = torch.tensor([number for number, size in enumerate(sizes) for _ in range(size)])
    seen = ((parts == 0) | (parts[:, None] == parts)).tril()
    return torch.stack([seen, torch.ones_like(seen).tril()])[:, None]


@pytest.mark.parametrize("block", [1, 4, 5, 12, 256])
@pytest.mark.parametrize(
    ("masked", "groups"),
    [
        *[("no", 3), ("by truth", 3), ("by numbers", 3), ("by truth", 1)],
        *[("family", 3), ("families", 1), ("for all tokens", 3)],
    ],
)
def test_trained_in_bfloat16_it_has_the_values_and_gradients_of_float64(monkeypatch, masked, groups, block):
    monkeypatch.setattr(attention.functional, "scaled_dot_product_attention", None)
    monkeypatch.setattr(attention, "_BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    sizes = ((2 * groups, 8), (2, 8), (2, 5))
    inputs = [torch.randn(2, heads, 12, width, generator=generator).bfloat16() for heads, width in sizes]
    seen = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    if masked.startswith("by"):
        seen[1, 0, :, :3] = False
        seen[1, 0, :3, 0] = True
    elif masked == "for all tokens":
        seen = torch.rand(2, 1, 1, 12, generator=generator) < 0.5
        seen[..., 5] = True
    elif masked == "families":
        seen = family([3, 4, 1, 4])
    elif masked == "family":
        seen = family([3, 4, 1, 4])[:1]
    mask = {"no": None, "by numbers": added_mask(seen, torch.bfloat16)}.get(masked, seen)
    wants, found = [], []
    for dtype, into in ((torch.float64, wants), (torch.bfloat16, found)):
        query, key, value = (tensor.to(dtype).requires_grad_() for tensor in inputs)
        if dtype == torch.float64:
            out = head_by_head(query * math.sqrt(8) / 2, key, value, seen, groups)
        else:
            with torch.autocast("cpu", torch.bfloat16):
                out, _ = folded_attention(layer(groups), query, key, value, mask, scaling=0.5)
            assert out.dtype == torch.bfloat16
        (out * torch.arange(5)).sum().backward()
        into += [out, query.grad, key.grad, value.grad]
    for want, got in zip(wants, found, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0.02, atol=0.02 * want.abs().max().item())


@pytest.mark.parametrize("masked", ["by truth", "by numbers"])
@pytest.mark.parametrize("sizes", [[12], [4, 4, 4], [2, 1, 5, 1, 3]])
def test_written_out_it_makes_no_weight_of_what_no_token_of_a_block_sees(monkeypatch, sizes, masked):
    monkeypatch.setattr(attention, "_BLOCK", 4)
    seen = family(sizes)[:1]
    counted = sum(4 * int(rows.any(dim=0).sum()) for rows in seen[0, 0].split(4))
    query, key = (torch.randn(1, heads, 12, 15).bfloat16().requires_grad_() for heads in (2, 1))
    saved = []

    def save(tensor):
        # Of what products and the softmax keep to go backward, the weights are all that is w wide in neither direction.
        if tensor.is_floating_point() and 15 not in tensor.shape[-2:]:
            saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        mask = seen if masked == "by truth" else added_mask(seen, torch.bfloat16)
        folded_attention(layer(2), query, key, key, mask)
    assert sum({tensor.data_ptr(): tensor.numel() for tensor in saved}.values()) == 2 * counted


@pytest.mark.parametrize("block", [2, 256])
@pytest.mark.parametrize("kind", ["truth", "numbers", "float32", "infinity"])
def test_a_row_that_sees_nothing_is_still_a_number_and_changes_no_other_one(monkeypatch, block, kind):
    monkeypatch.setattr(attention, "_BLOCK", block)
    inputs = [torch.randn(1, 2, 4, 8).bfloat16().requires_grad_() for _ in range(3)]
    seen = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    want, _ = folded_attention(layer(1), *inputs, seen)
    blind = seen.clone()
    blind[0, 0, :2] = False
    mask = {
        "truth": blind,
        "numbers": added_mask(blind, torch.bfloat16),
        "float32": added_mask(blind, torch.float32),
        "infinity": torch.zeros(blind.shape, dtype=torch.bfloat16).masked_fill(~blind, -torch.inf),
    }[kind]
    got, _ = folded_attention(layer(1), *inputs, mask)
    got[:, 2:].sum().backward()
    assert torch.equal(got[:, 2:], want[:, 2:])
    assert all(torch.isfinite(tensor.grad).all() for tensor in inputs)
    assert torch.isfinite(got).all()


@pytest.mark.parametrize("why", ["nothing", "not causal", "more keys", "dropout", "too many weights", "float32"])
def test_what_cannot_be_written_out_is_left_to_the_kernel(monkeypatch, why):
    asked = []

    def kernel(query, key, value, **arguments):
        asked.append(arguments)
        return query

    monkeypatch.setattr(attention.functional, "scaled_dot_product_attention", kernel)
    monkeypatch.setattr(attention, "_BLOCK", 5)
    # Blocks of 5, 5 and 2 tokens, which see 5, 10 and 12.
    monkeypatch.setattr(attention, "_MOST_WEIGHTS", 2 * 3 * (25 + 50 + 24) - (why == "too many weights"))
    dtype = torch.float32 if why == "float32" else torch.bfloat16
    query = torch.randn(2, 3, 12, 8, dtype=dtype, requires_grad=True)
    key = torch.randn(2, 3, 13 if why == "more keys" else 12, 8, dtype=dtype)
    module = layer(1)
    module.is_causal = why != "not causal"
    folded_attention(module, query, key, key, None, dropout=0.1 if why == "dropout" else 0.0)
    assert [call["is_causal"] for call in asked] == ([] if why == "nothing" else [why != "not causal"])


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral", "gemma3_text"])
def test_models_decode_as_with_eager_attention(make_slm, architecture):
    slm = make_slm(architecture)
    prepare_attention(slm.model.device)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    ids = torch.tensor([[1, 5, 9, 13, 17], [0, 0, 7, 11, 15]])
    seen = (torch.arange(5) >= torch.tensor([[0], [2]])).long()
    found = {}
    for kind in ("sdpa", "eager"):
        slm.model.set_attn_implementation(kind)
        out = slm.generate(
            input_ids=ids,
            attention_mask=seen,
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        found[kind] = torch.stack(out.logits)
    torch.testing.assert_close(found["sdpa"], found["eager"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("tokens", "folds"), [(1, True), (8, True), (9, False)])
def test_only_few_tokens_are_folded(monkeypatch, tokens, folds):
    asked = []

    def kernel(query, *_, **__):
        asked.append(query.shape)
        return query

    monkeypatch.setattr(attention.functional, "scaled_dot_product_attention", kernel)
    mask = torch.ones(2, 1, tokens, 10, dtype=torch.bool)
    folded_attention(layer(3), torch.zeros(2, 6, tokens, 8), torch.zeros(2, 2, 10, 8), torch.zeros(2, 2, 10, 8), mask)
    assert asked == [(2, 2, 3 * tokens, 8) if folds else (2, 6, tokens, 8)]


def test_a_loaded_model_attends_so(monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", None)
    monkeypatch.setenv("TRANSFORMERS_SDPA_FORCE_GQA", "0")
    slm = load_tiny("llama", 2, 32, 0, "float32")
    assert slm.model.config._attn_implementation == "sdpa"
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is folded_attention
    assert os.environ["TRANSFORMERS_SDPA_FORCE_GQA"] == "1"
