"""How many torch operations a boundary adds to a training step."""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from benchmarks.boundary_cost import EVERY, operations
from lightning_sg import AutoPredictor, LocalLoss


@pytest.mark.parametrize(("predictor", "most"), [(AutoPredictor, 100), (LocalLoss, 40)])
def test_a_boundary_adds_few_operations_to_a_step(predictor: Any, most: int) -> None:
    plain, cut = operations("mlp", None), operations("mlp", predictor())
    assert statistics.median(plain) > 100  # the operations of the six layers themselves are seen
    assert 5 < (statistics.median(cut) - statistics.median(plain)) / 6 <= most


def test_the_last_boundary_alone_adds_few_too_though_it_matches_its_target_at_times() -> None:
    plain, cut = operations("mlp", None), operations("mlp", "one")
    added = [mine - statistics.median(plain) for mine in cut]
    assert 5 < statistics.median(added) <= 100
    turns = added[: len(added) // EVERY * EVERY]
    assert sum(each > 200 for each in turns) == len(turns) // EVERY, "it is matched on one batch in each turn"
    assert statistics.fmean(turns) <= 100
