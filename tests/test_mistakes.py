"""Mistakes in the configuration that are refused before anything is computed, in a sentence that says what is allowed."""

import re

import pytest
import torch
from tiny import composed, run_tiny

from dynprune.router.checkpoint import save_router
from dynprune.stages.adapters import adapters
from dynprune.stages.router import new_policy, new_router, router, trained_router
from dynprune.stages.run import Run


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("hardware.device=foo", "hardware.device=foo is unknown; allowed: cpu, cuda"),
        ("hardware.device=cuda", "hardware.device=cuda needs a GPU, and torch sees none here; type hardware=cpu"),
        (
            "hardware.trainer.accelerator=gpu",
            "hardware.trainer.accelerator=gpu needs a GPU, and torch sees none here; type hardware=cpu",
        ),
        ("method.epochs=0", "method.epochs=0 is not allowed; allowed: whole numbers from 1 on"),
        ("method.batch_size=0", "method.batch_size=0 is not allowed; allowed: whole numbers from 1 on"),
        ("adapter.max_samples=0", "adapter.max_samples=0 is not allowed; allowed: whole numbers from 1 on"),
        ("evaluation.latency.queries=-1", "evaluation.latency.queries=-1 is not allowed; allowed: whole numbers from 0 on"),
        ("seed=abc", "seed=abc is not allowed; allowed: whole numbers from 0 on"),
        ("exploration.seed=-1", "exploration.seed=-1 is not allowed; allowed: whole numbers from 0 on"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(typed, said, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        run_tiny(tmp_path, "mistake", typed)
    assert not list(tmp_path.glob("outputs/artifacts/*"))


def test_a_router_of_a_table_is_checked_too(tmp_path):
    with pytest.raises(ValueError, match=r"^evaluation\.routers\.fbc\.epochs=0 is not allowed"):
        run_tiny(tmp_path, "mistake", "+method@evaluation.routers.fbc=fbc", "evaluation.routers.fbc.epochs=0")


def test_adapters_and_routers_of_another_slm_are_said(tmp_path, caplog):
    def run(*typed: str) -> Run:
        paths = (f"paths.run={tmp_path}/run", f"paths.artifacts={tmp_path}/artifacts")
        return Run(composed("experiment=tiny", "router.encoder.name_or_path=tiny:", "adapter.epochs=1", *paths, *typed))

    first = run()
    save_router(new_router(first), tmp_path / "router", {"policy": new_policy(first).config(), "slm": first.slm.name})
    ready = (f"adapter.folder={adapters(first).folder}", f"router.folder={tmp_path}/router")
    for typed, said in ((), False), (("model.architecture=qwen2",), True):
        caplog.clear()
        later = run(*typed, *ready)
        adapters(later)
        trained_router(later, router(later))
        kinds = [
            word
            for word in ("adapters", "router")
            if f"holds {word} of" in caplog.text or f"holds a {word} that" in caplog.text
        ]
        assert kinds == (["adapters", "router"] if said else [])
        assert said == (f"but the SLM is {later.slm.name}" in caplog.text)
