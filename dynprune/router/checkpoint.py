"""Saving and loading a router: ``router.safetensors`` has the weights, ``router.json`` what rebuilds it."""

import json
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from dynprune.router.encoder import TextEncoder
from dynprune.router.encoders import build_encoder
from dynprune.router.router import Router
from dynprune.slm.loading import SLM

_WEIGHTS = "router.safetensors"
_DESCRIPTION = "router.json"
_ENCODER = "encoder."
ROUTER_FILES = (_WEIGHTS, _DESCRIPTION)
"""The files of a router."""


def save_router(router: Router, folder: Path, extra: dict[str, Any]) -> None:
    """Writes a router, replacing the one in the folder.

    The encoder's weights are written only if they were trained; otherwise its arguments, such as name and
    revision, stand for them. The folder is written under a temporary name and then renamed: it never holds a
    part of a router, or parts of two.

    Args:
        router: The router.
        folder: Folder of its own for the router; what else it holds is lost.
        extra: JSON values to keep beside it, such as ``{"policy": policy.config()}``.
    """
    encoder = router.encoder
    weights = {
        name: tensor.detach().contiguous()
        for name, tensor in router.state_dict().items()
        if encoder.trainable or not name.startswith(_ENCODER)
    }
    description = {
        "num_layers": router.num_layers,
        "head_hidden_dim": router.head_hidden_dim,
        "log_std_min": router.log_std_min,
        "log_std_max": router.log_std_max,
        "num_counts": router.num_counts,
        "inputs": encoder.inputs,
        "encoder": encoder.arguments(),
        "embedding_size": encoder.size,
        "extra": extra,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        save_file(weights, new / _WEIGHTS)
        (new / _DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            folder.rename(Path(scratch) / "old")
        new.rename(folder)


def load_router(folder: Path, slm: SLM | None = None, dtype: str | None = None) -> tuple[Router, dict[str, Any]]:
    """Reads what `save_router` wrote.

    Args:
        folder: The router's folder.
        slm: The SLM that is pruned, for a router that reads its states.
        dtype: Number format of a frozen encoder of texts; that which it had in training by default.

    Returns:
        The router, in evaluation mode on the CPU, and the extra values.

    Raises:
        ValueError: If the folder holds no router, its files do not belong together, or the encoder cannot be
            had.
    """
    try:
        description = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
        weights = load_file(folder / _WEIGHTS)
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder} holds no router; allowed: a folder with {_DESCRIPTION} and {_WEIGHTS}, as stage=router writes it"
        ) from error
    # Routers that were written before there was a choice read the query and have the Normal.
    inputs, arguments = description.get("inputs", TextEncoder.inputs), dict(description["encoder"])
    if dtype is not None and inputs == TextEncoder.inputs and not arguments["trainable"]:
        arguments["dtype"] = dtype
    encoder = build_encoder(inputs, arguments, slm)
    if encoder.size != description["embedding_size"]:
        raise ValueError(
            f"{folder / _DESCRIPTION}: the router was trained on embeddings of size "
            f"{description['embedding_size']}, but {encoder.name} gives {encoder.size}; "
            f"allowed: the encoder and revision that it was trained with"
        )
    sizes = ("num_layers", "head_hidden_dim", "log_std_min", "log_std_max")
    router = Router(encoder, **{key: description[key] for key in sizes}, num_counts=description.get("num_counts"))
    missing, unexpected = router.load_state_dict(weights, strict=False)
    wrong = [name for name in missing if encoder.trainable or not name.startswith(_ENCODER)] + unexpected
    if wrong:
        raise ValueError(
            f"{folder / _WEIGHTS} does not belong to {_DESCRIPTION} beside it: {wrong[0]!r} is in only one "
            f"of the two; allowed: both files from one run"
        )
    return router.eval(), description["extra"]
