"""How many torch operations a boundary adds to a training step."""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from benchmarks.boundary_cost import operations
from lightning_sg import AutoPredictor, LocalLoss


@pytest.mark.parametrize(("predictor", "most"), [(AutoPredictor, 100), (LocalLoss, 40)])
def test_a_boundary_adds_few_operations_to_a_step(predictor: Any, most: int) -> None:
    plain, cut = operations("mlp", None), operations("mlp", predictor())
    assert statistics.median(plain) > 100  # the operations of the six layers themselves are seen
    assert 5 < (statistics.median(cut) - statistics.median(plain)) / 6 <= most
