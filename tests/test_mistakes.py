"""Mistakes in the configuration that are refused before anything is computed, in a sentence that says what is allowed."""

import re

import pytest
import torch
from tiny import run_tiny


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
