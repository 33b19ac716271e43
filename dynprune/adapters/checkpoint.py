"""Saving and loading adapters: our safetensors file with its config, and the thesis's ``adapter_{i}.pth`` files."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dynprune.adapters.stack import Activation, AdapterStack
from dynprune.atomic import replacing

_WEIGHTS = "adapters.safetensors"
_CONFIG = "adapters.json"
_SHIPPED = Path(__file__).parent / "shipped"
ADAPTER_FILES = (_CONFIG, _WEIGHTS, "adapter_*.pth")
"""Of a folder with adapters, what can change a result; their card cannot."""
_NAMES = ("down_Lbd", "down_bias_Lb", "up_Ldb", "up_bias_Ld")
_SINK = "sink_Ld"
# The thesis's layer1 is W_down, its layer2 W_up.
_THESIS_NAMES = ("layer1.weight", "layer1.bias", "layer2.weight", "layer2.bias")


def save_adapters(adapters: AdapterStack, folder: Path, slm: str) -> None:
    """Writes ``adapters.safetensors`` and ``adapters.json``.

    Args:
        adapters: The adapters.
        folder: Where to write.
        slm: Name of the SLM that they were made for.
    """
    with replacing(folder / _WEIGHTS) as path:
        save_file({name: value.detach().contiguous() for name, value in adapters.state_dict().items()}, path)
    config = {
        "num_layers": adapters.num_layers,
        "hidden_size": adapters.hidden_size,
        "bottleneck": adapters.bottleneck,
        "activation": adapters.activation,
        "slm": slm,
    }
    with replacing(folder / _CONFIG) as path:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def adapters_folder(adapters: str) -> Path:
    """The folder of some adapters: shipped ones' by their name, else the path itself."""
    return _SHIPPED / adapters if (_SHIPPED / adapters).is_dir() else Path(adapters)


def made_for(folder: Path) -> str | None:
    """Name of the SLM that the adapters in a folder were made for; ``None`` where they do not say, as the thesis's do not."""
    path = folder / _CONFIG
    return json.loads(path.read_text(encoding="utf-8")).get("slm") if path.is_file() else None


def load_adapters(folder: Path) -> AdapterStack:
    """Reads adapters that `save_adapters` wrote, or else the thesis's ``adapter_{i}.pth`` files.

    Args:
        folder: A folder with either.

    Raises:
        ValueError: If there are neither, a layer is missing, or a file does not hold an adapter.
    """
    if (folder / _WEIGHTS).is_file():
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        # Files that do not say so were written when all adapters had a ReLU.
        return _from_state(load_file(folder / _WEIGHTS), folder / _WEIGHTS, config.get("activation", "relu"))
    files = {int(path.stem.removeprefix("adapter_")): path for path in folder.glob("adapter_[0-9]*.pth")}
    if sorted(files) != list(range(len(files))) or not files:
        raise ValueError(
            f"{folder} holds neither {_WEIGHTS} nor adapter_0.pth to adapter_{{L-1}}.pth without a gap "
            f"(found layers {sorted(files)}); give a folder written by dynprune stage=adapters or the thesis's"
        )
    layers = []
    for index in range(len(files)):
        state = torch.load(files[index], map_location="cpu", weights_only=True)
        missing = [name for name in _THESIS_NAMES if name not in state]
        if missing:
            raise ValueError(f"{files[index]} lacks {missing}; the thesis's adapters have {list(_THESIS_NAMES)}")
        layers.append([state[name].float() for name in _THESIS_NAMES])
    try:
        stacked = {name: torch.stack(list(tensors)) for name, tensors in zip(_NAMES, zip(*layers, strict=True), strict=True)}
    except RuntimeError as error:
        raise ValueError(f"the adapters in {folder} differ in shape from layer to layer: {error}") from None
    return _from_state(stacked, folder, "relu")


def save_thesis_adapters(adapters: AdapterStack, folder: Path) -> None:
    """Writes one ``adapter_{i}.pth`` a layer, as the thesis's code reads them: with ReLU, all tokens treated alike."""
    assert adapters.activation == "relu", "the thesis's adapters have a ReLU"
    assert adapters.sink_Ld is None, "the thesis's adapters treat all tokens alike"
    for index in range(adapters.num_layers):
        state = {
            thesis: getattr(adapters, name)[index].detach().clone() for thesis, name in zip(_THESIS_NAMES, _NAMES, strict=True)
        }
        with replacing(folder / f"adapter_{index}.pth") as path:
            torch.save(state, path)


def _from_state(state: dict[str, torch.Tensor], where: Path, activation: Activation) -> AdapterStack:
    if set(state) - {_SINK} != set(_NAMES):
        raise ValueError(f"{where} holds {sorted(state)}, but adapters have {sorted(_NAMES)}, and may have {_SINK}")
    num_layers, bottleneck, hidden_size = state["down_Lbd"].shape
    adapters = AdapterStack(num_layers, hidden_size, bottleneck, activation, sink=_SINK in state)
    try:
        adapters.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{where} holds tensors whose shapes do not fit each other: {error}") from None
    return adapters.requires_grad_(False).eval()
