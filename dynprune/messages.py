"""What other libraries say that no user needs to read."""

import logging
import warnings

_MEANT_TO_BE_SO = (
    # A frozen encoder or SLM is in evaluation mode on purpose.
    r"Found \d+ module\(s\) in eval mode",
    # The streams count right on every rank and worker.
    r"Your `IterableDataset` has `__len__` defined",
    # The streams are cheaper than a worker process.
    r"The '\w+' does not have many workers",
    # A job is one run there, in which its trainings stand beside each other.
    r"There is a wandb run already in progress",
    # Other libraries' own use of transformers and torch.
    r"`is_gradient_checkpointing` is deprecated",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)


def quieten() -> None:
    """Leaves out what Lightning says at each start, and warnings of what is meant to be so."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _MEANT_TO_BE_SO:
        warnings.filterwarnings("ignore", message=message)
