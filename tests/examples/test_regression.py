"""Regression on house prices and on a generated function."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from examples.regression import DIABETES_FEATURES, FEATURES, Housing, RegressionMLP
from lightning_sg import Boundary, SyntheticGradients
from tests.examples.files import count_boundaries
from tests.models import make_trainer


@pytest.mark.parametrize(("source", "features"), [("generated", FEATURES), ("diabetes", DIABETES_FEATURES)])
def test_regression_trains(source, features):
    model = RegressionMLP(features=features, width=8)
    assert count_boundaries(model) == 2
    data = Housing(source, samples=300, batch_size=32)
    trainer = make_trainer(fast_dev_run=True, callbacks=[SyntheticGradients()])
    trainer.fit(model, data)
    [tested] = trainer.test(model, data, verbose=False)
    assert 0 < tested["test_loss"] < 10


def test_regression_targets_may_be_a_column():
    model = RegressionMLP(width=8)
    x, y = torch.randn(6, FEATURES), torch.randn(6)
    model.eval()
    assert torch.equal(model.squared_error((x, y)), model.squared_error((x, y.unsqueeze(1))))


def test_regression_data_are_the_same_every_time_and_standardised():
    first, second = Housing(samples=500), Housing(samples=500)
    first.setup("fit")
    torch.rand(3)
    second.setup("fit")
    for part in ("train", "validation", "test"):
        for left, right in zip(getattr(first, part).tensors, getattr(second, part).tensors):
            assert torch.equal(left, right)
    x, y = first.train.tensors
    assert (len(first.train), len(first.validation), len(first.test)) == (350, 50, 100)
    torch.testing.assert_close(x.mean(0), torch.zeros(FEATURES), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std(), torch.ones(()))


def test_regression_refuses_nonsense():
    with pytest.raises(ValueError, match="not 5"):
        RegressionMLP(stages=5)
    with pytest.raises(ValueError, match="source must be"):
        Housing("california")
    with pytest.raises(ValueError, match="at least 10"):
        Housing(samples=3)


@pytest.mark.parametrize(("stages", "places"), [(1, []), (2, [2]), (3, [1, 2]), (4, [1, 2, 3])])
def test_regression_boundaries(stages, places):
    net = RegressionMLP(width=8, stages=stages).net
    hidden = 0
    found = []
    for child in net:
        hidden += isinstance(child, nn.ReLU)
        if isinstance(child, Boundary):
            found.append(hidden)
    assert found == places
