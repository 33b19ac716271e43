import lightning
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dynprune.slm.byte_tokenizer import byte_tokenizer
from dynprune.slm.loading import SLM


@pytest.fixture
def make_slm():
    """Builds a tiny random SLM whose layers change a lot, so that pruning one shows."""

    def make(architecture: str = "llama", num_layers: int = 4, **overrides) -> SLM:
        tokenizer = byte_tokenizer()
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            architecture,
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=2048,
            initializer_range=0.3,
            **overrides,
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        tokenizer.padding_side = "left"
        return SLM(model=model, tokenizer=tokenizer, name=architecture)

    return make


@pytest.fixture
def make_trainer(tmp_path):
    """Builds a trainer that keeps quiet and writes nothing; like the product's, it asks for a new loader each epoch."""

    def make(epochs: int) -> lightning.Trainer:
        return lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            default_root_dir=tmp_path,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            reload_dataloaders_every_n_epochs=1,
        )

    return make
