"""Whether predicted probabilities are as frequent as they say: expected calibration error and Brier score.

Legend: R = predictions, C = columns, what is predicted at once (layers, for example).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_calibration_error
from torchmetrics.utilities import dim_zero_cat


@dataclass(frozen=True)
class CalibrationErrors:
    """Errors of probabilities; all are 0 at best and 1 at worst.

    Attributes:
        ece: Expected calibration error over all columns together.
        brier: Brier score over all columns together.
        ece_C: Expected calibration error of each column.
        brier_C: Brier score of each column.
    """

    ece: Tensor
    brier: Tensor
    ece_C: Tensor
    brier_C: Tensor


def calibration_errors(probability_RC: Tensor, outcome_RC: Tensor, bins: int = 15) -> CalibrationErrors:
    """Expected calibration error (Naeini et al., 2015) and Brier score.

    ECE = Σ_b n_b/n · |mean outcome in b − mean probability in b| over bins b of equal width; Brier = mean (probability −
    outcome)². A column that is right on average has a small error even where it knows nothing of the query, so read ECE
    beside Brier.

    Args:
        probability_RC: Predicted probabilities.
        outcome_RC: What came true: 0 or 1, or a share in between.
        bins: Number of bins.
    """
    outcome_RC = outcome_RC.to(probability_RC.dtype)

    def ece(probability: Tensor, outcome: Tensor) -> Tensor:
        # Unchecked, since the check allows no shares as outcomes.
        return binary_calibration_error(probability, outcome, n_bins=bins, norm="l1", validate_args=False)

    squared_RC = (probability_RC - outcome_RC) ** 2
    columns = zip(probability_RC.T.contiguous(), outcome_RC.T.contiguous(), strict=True)
    return CalibrationErrors(
        ece=ece(probability_RC.flatten(), outcome_RC.flatten()),
        brier=squared_RC.mean(),
        ece_C=torch.stack([ece(probability_R, outcome_R) for probability_R, outcome_R in columns]),
        brier_C=squared_RC.mean(dim=0),
    )


class Calibration(Metric):
    """`calibration_errors` of all predictions of an epoch, of all processes."""

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    probability: list[Tensor]
    outcome: list[Tensor]

    def __init__(self, columns: Sequence[str]) -> None:
        """Starts with no prediction.

        Args:
            columns: What the columns are, for the names of their errors.
        """
        super().__init__()
        self._columns = list(columns)
        self.add_state("probability", [], dist_reduce_fx="cat")
        self.add_state("outcome", [], dist_reduce_fx="cat")

    def update(self, probability_RC: Tensor, outcome_RC: Tensor) -> None:
        """Adds predictions and what came true."""
        self.probability.append(probability_RC.detach())
        self.outcome.append(outcome_RC.to(probability_RC.dtype))

    def compute(self) -> dict[str, Tensor]:
        """The errors of all that was added: ``ece``, ``brier`` and, of several columns, ``ece_COLUMN`` and ``brier_COLUMN``."""
        errors = calibration_errors(dim_zero_cat(self.probability), dim_zero_cat(self.outcome))
        named = {"ece": errors.ece, "brier": errors.brier}
        if len(self._columns) > 1:
            named |= {f"ece_{column}": error for column, error in zip(self._columns, errors.ece_C, strict=True)}
            named |= {f"brier_{column}": error for column, error in zip(self._columns, errors.brier_C, strict=True)}
        return named
