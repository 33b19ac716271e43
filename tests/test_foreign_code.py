"""Code that a model's repository brings is never run, and nobody is asked whether to run it."""

import json
from pathlib import Path

import pytest

from dynprune.router.encoder import TextEncoder
from dynprune.slm.byte_tokenizer import byte_tokenizer
from dynprune.slm.loading import load_hf


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A model of an architecture of its own, whose code leaves a mark where it runs."""
    mark = tmp_path / "was_run"
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked at the terminal"))
    folder = tmp_path / "model"
    byte_tokenizer().save_pretrained(folder)
    classes = {"AutoConfig": "own.Config", "AutoModel": "own.Model", "AutoModelForCausalLM": "own.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "of_its_own", "auto_map": classes}))
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    yield folder
    assert not mark.exists()


def test_an_slm_with_code_of_its_own_is_refused(repository):
    with pytest.raises(ValueError, match=r"^model\.name='.+' brings code of its own, which is never run here; allowed: "):
        load_hf(str(repository), "float32")


def test_an_encoder_with_code_of_its_own_is_refused(repository):
    with pytest.raises(ValueError, match=r"^router\.encoder\.name_or_path='.+' brings code of its own"):
        TextEncoder(str(repository), None, 16, False)
