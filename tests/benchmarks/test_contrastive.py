"""The benchmark of losses without labels runs, and its default predictors are of use."""

from __future__ import annotations

import pytest

from benchmarks import contrastive
from benchmarks.contrastive import LOSSES, METHODS, run


@pytest.mark.parametrize("method", METHODS)
def test_a_run_trains(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setattr(contrastive, "STEPS", 60)
    before = run(LOSSES["SimCLR"], "backpropagation", 1)[0]
    value, cosine = run(LOSSES["SimCLR"], method, 1)
    assert value < 1.3 * before
    assert (cosine is None) == (method == "backpropagation")


def test_what_a_loss_tells_brings_predictions_towards_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive, "STEPS", 100)
    for name in ("SimCLR", "cosine similarity to a goal"):
        (_value, told), (_other, untold) = run(LOSSES[name], "default", 0), run(LOSSES[name], "not told", 0)
        assert told is not None
        assert untold is not None
        assert told > untold + 0.1
