"""The sizes of pruned sets that the configuration asks for."""

from typing import Any

from dynprune.stages.run import Run, plain


def sizes_of(run: Run, name: str) -> list[Any]:
    """The sizes that a baseline's rows shall have.

    Raises:
        ValueError: If a set cannot have so many layers.
    """
    sizes: list[Any] = plain(run.config.evaluation.baselines[name].sizes)
    # The oracle's is a mean over queries, so it may be any number from 0 on.
    return possible(run, f"evaluation.baselines.{name}.sizes", sizes, least=0 if name == "oracle" else 1)


def possible(run: Run, key: str, sizes: list[Any], least: int) -> list[Any]:
    """Checks sizes.

    Args:
        run: The run.
        key: The configuration key that has them.
        sizes: The sizes, in layers.
        least: The smallest that is allowed; with 0 they may be any number, else whole ones.

    Raises:
        ValueError: If a set cannot have so many layers.
    """
    num_layers = run.slm.num_layers
    for size in sizes:
        if not least <= size <= num_layers or (least and size != int(size)):
            raise ValueError(
                f"{key} asks for {size} layers, but {run.slm.name} has {num_layers}; allowed: {least} to {num_layers}; for "
                f"example {key}=[2,4]"
            )
    return sizes
