"""The relative error and the squared norms."""

from __future__ import annotations

import pytest
import torch

from lightning_sg.predictors.norms import relative_error


def test_the_relative_error_compares_with_the_size_of_all_targets() -> None:
    targets = (torch.full((2, 3), 2.0), torch.zeros(4))
    assert relative_error((torch.zeros(2, 3), torch.zeros(4)), targets) == 1.0
    assert relative_error((torch.full((2, 3), 1.0), torch.ones(4)), targets) == pytest.approx((6 + 4) / 24)


def test_the_relative_error_of_zero_targets_is_finite() -> None:
    assert relative_error((torch.zeros(8),), (torch.zeros(8),)) == 0.0
    assert relative_error((torch.full((8,), 0.1),), (torch.zeros(8),)).isfinite()
