"""Loading the SLM: the dtype that ``auto`` stands for, and the mistakes that a person can make."""

import pytest
import torch
from tiny import composed

from dynprune.slm.loading import is_another, load_hf, load_tiny, resolve_dtype
from dynprune.stages.export import slm_source
from dynprune.stages.run import Run


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx2": True}, "float32"),
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, "float32"),
        ({"avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
        ({"neon": True, "bf16": True}, "bfloat16"),
        ({"neon": True, "bf16": False}, "float32"),
    ],
)
def test_auto_is_bfloat16_where_the_processor_multiplies_it(capabilities, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve_dtype("auto", "cpu") == dtype
    assert resolve_dtype("auto", "cuda") == "bfloat16"
    assert resolve_dtype("float16", "cpu") == "float16"


def test_auto_is_the_dtype_of_the_loaded_model(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert load_tiny("llama", num_layers=2, hidden_size=32, seed=0, dtype="auto").model.dtype == torch.bfloat16


def test_an_unknown_dtype_is_refused_with_those_that_are_allowed():
    with pytest.raises(ValueError, match=r"model\.dtype='int3' is unknown; allowed: auto, float32, bfloat16, float16"):
        load_tiny("llama", num_layers=2, hidden_size=32, seed=0, dtype="int3")


def test_two_revisions_of_a_hub_model_have_two_names(tmp_path, monkeypatch):
    """So that adapters of one are not taken for those of the other; the cache is laid out as huggingface_hub does it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--tiny"
    commits = {"old": "a" * 40, "main": "b" * 40}
    for seed, (revision, commit) in enumerate(commits.items()):
        slm = load_tiny("llama", num_layers=2, hidden_size=32, seed=seed)
        for part in (slm.model, slm.tokenizer):
            part.save_pretrained(repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    assert load_hf("org/tiny", "float32").name == f"org/tiny@{commits['main']}"
    assert load_hf("org/tiny", "float32", revision="old").name == f"org/tiny@{commits['old']}"
    slm = load_hf("org/tiny", "float32")
    assert not any(is_another(name, slm) for name in (slm.name, "org/tiny", "", None))
    assert is_another(f"org/tiny@{commits['old']}", slm)
    assert is_another("org/other", slm)
    folder = repository / "snapshots" / commits["old"]
    assert load_hf(str(folder), "float32").name == str(folder)

    def run(*typed: str) -> Run:
        return Run(composed("experiment=tiny", "model=hf", "model.name=org/tiny", "model.dtype=float32", *typed, "paths.run=x"))

    # What was computed with a branch is not that of its next commit, and a model to take away names the one it was made with.
    before = run().model_identity
    (repository / "refs/main").write_text(commits["old"])
    assert run().model_identity != before
    assert slm_source(run())["arguments"]["revision"] == commits["old"]
    (repository / "refs/main").write_text(commits["main"])
    assert run().model_identity == before
    assert run("model.revision=old").model_identity["content"] == commits["old"]
    assert run("model.name=org/nowhere").model_identity["content"] is None


def test_runs_of_the_same_slm_share_it_and_others_do_not(tmp_path):
    def slm(*typed: str):
        return Run(composed("experiment=tiny", f"paths.run={tmp_path}", *typed)).slm

    first = slm()
    assert slm("seed=3", "method=fbc") is first
    other = slm("model.dtype=bfloat16")
    assert other.model.dtype == torch.bfloat16
    # One at a time is kept.
    again = slm()
    assert again is not first
    run = Run(composed("experiment=tiny", f"paths.run={tmp_path}"))
    assert run.slm is again
    run.release_slm()
    assert run.slm is not again
