import numpy as np
import pytest
import torch
from sklearn.metrics import brier_score_loss

from dynprune.metrics.calibration import Calibration, calibration_errors


def ece_by_bins(probability: np.ndarray, outcome: np.ndarray, bins: int) -> float:
    total = 0.0
    for b in range(bins):
        inside = (probability >= b / bins) & (probability < (b + 1) / bins)
        if inside.any():
            total += inside.mean() * abs(outcome[inside].mean() - probability[inside].mean())
    return total


def predictions(rows: int = 200, columns: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    probability_RC = torch.rand(rows, columns, generator=generator)
    return probability_RC, torch.rand(rows, columns, generator=generator) < probability_RC**2


def test_errors_by_hand():
    # Two predictions of 0.75, of which half come true, and one of 0.1 that does not.
    errors = calibration_errors(torch.tensor([[0.75], [0.75], [0.1]]), torch.tensor([[True], [False], [False]]), bins=2)
    assert errors.ece.item() == pytest.approx((2 * 0.25 + 0.1) / 3)
    assert errors.brier.item() == pytest.approx((0.0625 + 0.5625 + 0.01) / 3)


@pytest.mark.parametrize("bins", [5, 15])
def test_errors_are_those_of_the_definition_by_column_and_in_all(bins):
    probability_RC, outcome_RC = predictions()
    p, y = probability_RC.double().numpy(), outcome_RC.double().numpy()
    errors = calibration_errors(probability_RC, outcome_RC, bins)
    assert errors.ece.item() == pytest.approx(ece_by_bins(p.ravel(), y.ravel(), bins), abs=1e-6)
    assert errors.brier.item() == pytest.approx(brier_score_loss(y.ravel(), p.ravel()), abs=1e-6)
    for column in range(3):
        assert errors.ece_C[column].item() == pytest.approx(ece_by_bins(p[:, column], y[:, column], bins), abs=1e-6)
        assert errors.brier_C[column].item() == pytest.approx(brier_score_loss(y[:, column], p[:, column]), abs=1e-6)


def test_an_outcome_may_be_a_share():
    errors = calibration_errors(torch.full((2, 1), 0.5), torch.tensor([[0.25], [0.75]]))
    assert errors.ece.item() == pytest.approx(0)
    assert errors.brier.item() == pytest.approx(0.0625)


def test_an_epoch_is_the_sum_of_its_batches_under_the_columns_names():
    probability_RC, outcome_RC = predictions()
    metric = Calibration(["a", "b", "c"])
    for rows in (slice(0, 50), slice(50, 50), slice(50, 200)):
        metric.update(probability_RC[rows], outcome_RC[rows])
    errors = calibration_errors(probability_RC, outcome_RC)
    found = metric.compute()
    assert set(found) == {f"{error}{column}" for error in ("ece", "brier") for column in ("", "_a", "_b", "_c")}
    assert found["ece"].item() == pytest.approx(errors.ece.item())
    assert found["ece_b"].item() == pytest.approx(errors.ece_C[1].item())
    assert found["brier_c"].item() == pytest.approx(errors.brier_C[2].item())


def test_one_column_has_no_errors_beside_those_in_all():
    metric = Calibration(["reward"])
    metric.update(torch.tensor([[0.5]]), torch.tensor([[1.0]]))
    assert {name: error.item() for name, error in metric.compute().items()} == {"ece": 0.5, "brier": 0.25}
