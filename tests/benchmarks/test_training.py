"""One training run is recorded, also if it diverges."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import training
from benchmarks.runs import Run
from benchmarks.tasks import BACKPROPAGATION, TASKS, WHOLE
from tests.benchmarks.records import DEFAULT


@pytest.fixture
def small(monkeypatch):
    """A training of a few steps."""
    task = TASKS["regression"]
    monkeypatch.setitem(TASKS, "regression", replace(task, data=lambda root, seed: training_data(), epochs=1))


def training_data():
    from examples.regression import Housing

    return Housing(samples=200, batch_size=16)


def test_training_is_recorded(small):
    plain = training.train(Run("regression", WHOLE, BACKPROPAGATION, 0, 1e-3, points=3), {})
    cut = training.train(Run("regression", "3 stages", DEFAULT, 0, 1e-3, points=3), {})
    assert plain is not None
    assert cut is not None
    for record in (plain, cut):
        assert record["steps"] == 140 // 16
        assert [step for step, _, _ in record["curve"]] == [3, 6, 8]
        assert not record["diverged"]
        assert record["metrics"]["test_loss"] > 0
        assert record["curve"][-1][2] == pytest.approx(record["metrics"]["val_loss"])
        assert 0 < record["curve"][0][1] < record["seconds"]
    assert plain["fingerprint"] == cut["fingerprint"]
    other = training.train(Run("regression", WHOLE, BACKPROPAGATION, 1, 1e-3), {})
    assert other is not None
    assert other["fingerprint"] != plain["fingerprint"]


@pytest.mark.parametrize(("split", "method"), [(WHOLE, BACKPROPAGATION), ("3 stages", DEFAULT)])
def test_diverged_training_is_recorded(small, monkeypatch, split, method):
    def broken(self, batch):
        return (self(batch[0]) * float("nan")).mean()

    monkeypatch.setattr("examples.regression.RegressionMLP.squared_error", broken)
    record = training.train(Run("regression", split, method, 0, 1e-3), {})
    assert record is not None
    assert record["diverged"]
    json.loads(json.dumps(record, allow_nan=False))


def test_finite():
    assert training.finite(torch.tensor(1.5)) == 1.5
    assert training.finite(float("nan")) is None
    assert training.finite(float("inf")) is None
