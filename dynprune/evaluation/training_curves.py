"""How a router learned: its losses and its order of held-out pairs, epoch by epoch, as Lightning's CSV logger left them."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

METRICS = "metrics.csv"
_TRAINING, _VALIDATION, _ORDER = "train/loss", "validation/loss", "validation/rewards/accuracies"


@dataclass(frozen=True)
class TrainingCurve:
    """One training.

    Attributes:
        epochs: The epochs, from 0.
        training_loss: Mean over the steps of each epoch.
        validation_loss: At the end of each epoch.
        preference_accuracy: Share of held-out pairs in the right order, at the end of each epoch.
    """

    epochs: Sequence[int]
    training_loss: Sequence[float]
    validation_loss: Sequence[float]
    preference_accuracy: Sequence[float]


def read_curve(path: Path) -> TrainingCurve:
    """Reads what a training logged.

    Args:
        path: A file of Lightning's CSV logger.

    Returns:
        The epochs that ran to their end. What was logged after the last one, when the best checkpoint was validated once more,
        is no epoch.
    """
    logged: dict[int, dict[str, list[float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            of_epoch = logged.setdefault(int(line["epoch"]), {})
            for name in (_TRAINING, _VALIDATION, _ORDER):
                if line.get(name):
                    of_epoch.setdefault(name, []).append(float(line[name]))
    complete = {epoch: values for epoch, values in sorted(logged.items()) if len(values) == 3}
    return TrainingCurve(
        list(complete),
        [fmean(values[_TRAINING]) for values in complete.values()],
        [values[_VALIDATION][0] for values in complete.values()],
        [values[_ORDER][0] for values in complete.values()],
    )
