"""Every decoder-only architecture of the installed transformers that can be built tiny from its config, pruned.

A pruned model must say with its cache what it says without one, row by row of a mixed and left-padded batch what each row says
alone, layer 0 pruned or not; after the pruning it must be what it was, bit for bit, and a saved one must be loaded as it was.
What cannot be pruned must be refused with the reason.
"""

import random
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dynprune.slm.byte_tokenizer import byte_tokenizer
from dynprune.slm.generation import Request, generate_all
from dynprune.slm.loading import SLM, load_hf
from dynprune.slm.pruning import LayerPruner
from dynprune.slm.support import refusal

_LAYERS = 4
_TOKENS = 8
_LARGEST = 5_000_000
_TABLE = "architectures.md"
_TIE = 1e-3
_TINY: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "word_embed_proj_dim", "embedding_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"), _LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "v_head_dim", "qk_nope_head_dim", "attention_head_size"), 8),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_target_positions"), 512),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "qk_rope_head_dim": 8,
    "rotary_dim": 8,
    "vocab_size_per_layer_input": 300,
    "hidden_size_per_layer_input": 8,
    "initializer_range": 0.3,
    "sliding_window": 256,
}


def run(folder: Path) -> dict[str, Any]:
    """Tries all architectures.

    Args:
        folder: Where the table of all of them goes.

    Returns:
        ``architectures_passed``, ``architectures_refused``, ``architectures_failed`` (pruned wrongly) and
        ``architectures_not_built``.
    """
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = dict(results(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)))
    lines = [f"| {name} | {verdict} | {reason.replace('|', '/')} |" for name, (verdict, reason) in found.items()]
    text = "\n".join(["| architecture | verdict | reason |", "| --- | --- | --- |", *lines]) + "\n"
    (folder / _TABLE).write_text(text, encoding="utf-8")
    return {
        f"architectures_{kind}": sum(verdict == kind for verdict, _ in found.values())
        for kind in ("passed", "refused", "failed", "not_built")
    }


def results(names: Sequence[str]) -> Iterator[tuple[str, tuple[str, str]]]:
    """By name of the architecture, the verdict and the reason for it."""
    for name in names:
        try:
            model = tiny_model(name)
        except Exception as error:
            yield (
                name,
                ("not_built", f"{type(error).__name__}: {str(error).strip().splitlines()[0][:140]}" if str(error) else ""),
            )
            continue
        if reason := refusal(model):
            yield name, ("refused", reason)
            continue
        try:
            wrong = _wrong(name, model)
        except Exception as error:
            wrong = f"{type(error).__name__}: {str(error)[:300]}"
        yield name, ("failed", wrong) if wrong else ("passed", "")


def tiny_model(name: str) -> PreTrainedModel:
    """A tiny random model of an architecture, in float32.

    Raises:
        ValueError: If a size cannot be made small; and whatever transformers raises where it cannot be built so.
    """
    tokenizer = byte_tokenizer()
    kind = CONFIG_MAPPING[name]
    known = kind()
    # Others would become attributes that nothing reads.
    sizes = {key: value for key, value in _TINY.items() if hasattr(known, key) and _is_a_size(known, key)}
    special = dict.fromkeys(("pad_token_id", "eos_token_id", "bos_token_id"), tokenizer.eos_token_id)
    config = kind(**sizes, vocab_size=len(tokenizer), **special)
    torch.manual_seed(0)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > _LARGEST:
        raise ValueError(f"{size:,} parameters: not every size could be made small")
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.eval().requires_grad_(False)
    return model


def _is_a_size(config: Any, key: str) -> bool:
    # None stands for a part that there is not, but for these, which follow from others.
    return getattr(config, key) is not None or key in ("head_dim", "num_key_value_heads")


def _wrong(name: str, model: PreTrainedModel) -> str | None:
    """What a pruned model does wrongly; ``None`` for nothing."""
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = "left"
    if model.generation_config is not None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    slm = SLM(model, tokenizer, name)
    rng = random.Random(name)
    prompts = [tuple(rng.randrange(3, 250) for _ in range(length)) for length in (5, 9, 12, 17)]
    configurations = [(0,), (1, 3), (), tuple(range(rng.randrange(1, slm.num_layers)))]
    before = _logits(model, prompts[0])
    with LayerPruner(slm) as pruner:
        requests = [Request(*asked, _TOKENS) for asked in zip(prompts, configurations, strict=True)]
        said = dict(generate_all(slm, pruner, requests, batch_size=4))
        for place, (prompt, layers) in enumerate(zip(prompts, configurations, strict=True)):
            pruner.prune(layers)
            tokens = list(prompt)
            ended = [] if said[place].truncated else [tokenizer.eos_token_id]
            for token in [*said[place].token_ids, *ended]:
                logits_V = _logits(model, tokens)[-1]
                # A near-tie can fall either way: a batch rounds otherwise than a row.
                if logits_V[token] < logits_V.max() - _TIE:
                    return f"with its cache row {place} says {token} under {layers}, without it {int(logits_V.argmax())}"
                tokens.append(token)
        pruner.prune([0])
        pruned = _logits(model, prompts[0])
    if not torch.equal(_logits(model, prompts[0]), before):
        return "after the pruning it is not what it was"
    if torch.allclose(pruned, before, atol=1e-3):
        return "pruning layer 0 changes nothing"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        again = load_hf(folder, "float32")
        with LayerPruner(again) as pruner:
            pruner.prune([0])
            if not torch.allclose(_logits(again.model, prompts[0]), pruned, atol=1e-4):
                return "saved and loaded it says something else"
    return None


@torch.inference_mode()
def _logits(model: PreTrainedModel, tokens: Sequence[int]) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]
    return logits
