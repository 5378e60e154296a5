"""Rows of features from activations and context."""

from __future__ import annotations

import pytest
import torch

from lightning_sg.predictors.base import LossInfo
from lightning_sg.predictors.features import (
    as_rows,
    beside,
    context_features,
    count_classes,
    from_rows,
    is_label,
    join_rows,
    split_rows,
)
from tests.predictors.forms import FORMS, SAMPLES, Form, Task, forms


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((5,), (5, 1)),
        ((5, 3), (5, 3)),
        ((5, 4, 3), (5, 4, 3)),
        ((5, 3, 4, 6), (5, 4, 6, 3)),
        ((5, 2, 3, 4, 6), (5, 144)),
    ],
)
def test_rows_have_features_last_and_can_be_turned_back(shape: tuple[int, ...], rows: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    assert as_rows(tensor).shape == rows
    assert torch.equal(from_rows(as_rows(tensor), tensor), tensor)


@forms
def test_joined_rows_can_be_split(form: Form) -> None:
    activations, _labels = Task(form).batch(0)
    rows = join_rows(activations)
    assert rows.shape[0] == SAMPLES
    assert rows.numel() == sum(part.numel() for part in activations)
    for part, expected in zip(split_rows(rows, activations), activations, strict=True):
        assert torch.equal(part, expected)


def test_positions_that_differ_are_joined_by_sample() -> None:
    activations, _labels = Task(FORMS["an LSTM's output and the state of two layers"]).batch(0)
    rows = join_rows(activations)
    assert rows.shape == (SAMPLES, 3 * 4 + 2 * 4)
    torch.testing.assert_close(rows[3, 12:], activations[1][:, 3].flatten())


def test_labels_become_one_hot_and_unknown_ones_zeros() -> None:
    assert context_features(torch.tensor([1, -100, 3, 0]), 3).tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0]]
    assert context_features(torch.ones(4, 2, 3), None).shape == (4, 6)


def test_classes_are_counted_unless_the_models_cross_entropy_is_known() -> None:
    labels = torch.tensor([0, 4, 2])
    assert count_classes(labels, None) == 5
    assert count_classes(labels, LossInfo("mse", 9)) == 5
    assert count_classes(labels, LossInfo("cross_entropy", 9)) == 9


def test_labels_are_integers_and_booleans() -> None:
    assert is_label(torch.zeros(2, dtype=torch.long))
    assert is_label(torch.zeros(2, dtype=torch.bool))
    assert not is_label(torch.zeros(2))


@pytest.mark.parametrize(
    ("context", "expected"), [((4, 2), (4, 5, 8)), ((4, 5, 2), (4, 5, 8)), ((4, 3, 2), (4, 5, 12))]
)
def test_context_is_put_beside_every_row(context: tuple[int, ...], expected: tuple[int, ...]) -> None:
    rows, features = torch.randn(4, 5, 6), torch.randn(context)
    joined = beside(rows, features)
    assert joined.shape == expected
    assert torch.equal(joined[..., :6], rows)
    first = features[:, 0] if context == (4, 5, 2) else features.flatten(1)
    assert torch.equal(joined[:, 0, 6:], first)
