"""Dynamic layer pruning of small language models: each query gets its own set of layers to skip."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynprune.dynamic_model import DynamicModel

__all__ = ["DynamicModel"]


def __getattr__(name: str) -> Any:
    # Imported when it is asked for, so that the command line does not wait for torch.
    if name in __all__:
        from dynprune.dynamic_model import DynamicModel

        return DynamicModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
