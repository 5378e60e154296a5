"""How inputs are scaled."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from lightning_sg import FeedbackAlignment, HeadOptions, LinearPredictor, MLPPredictor
from lightning_sg.predictors.base import LossInfo
from lightning_sg.predictors.normalize import InputScale
from tests.predictors.forms import CLASSES, FORMS, LOSS_MODELS, Task, built, predict, trained_a_little


@pytest.mark.parametrize("kind", [LinearPredictor, MLPPredictor, HeadOptions, FeedbackAlignment])
def test_an_unknown_input_scale_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match="normalize must be 'scale', 'layer' or 'none', not 'batch'"):
        kind(normalize="batch")


def test_the_layer_scale_normalises_each_row() -> None:
    rows = InputScale("layer")(5 + 3 * torch.randn(4, 7, 32, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(rows.mean(-1), torch.zeros(4, 7), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows.square().mean(-1), torch.ones(4, 7), atol=1e-3, rtol=0)


def test_the_layer_scale_leaves_single_numbers() -> None:
    numbers = torch.randn(5, 1)
    assert torch.equal(InputScale("layer")(numbers), numbers)


def test_no_scale_changes_nothing() -> None:
    scale, features = InputScale("none"), torch.randn(4, 6)
    scale.update(100 * features)
    assert torch.equal(scale(features), features)


def test_the_running_scale_is_one_number_for_all_features_and_remembers() -> None:
    scale, features = InputScale("scale"), torch.tensor([[3.0, 4.0], [0.0, 5.0]])
    scale.update(features)
    torch.testing.assert_close(scale(features), features / 12.5**0.5)
    scale.update(torch.full((2, 2), 10.0))
    torch.testing.assert_close(scale(features), features / (0.99 * 12.5 + 0.01 * 100) ** 0.5)


def test_the_running_scale_is_saved_with_the_predictor() -> None:
    predictor = trained_a_little(LOSS_MODELS["loss model, loss, scale"], FORMS["vectors"])
    activations, labels = Task(FORMS["vectors"]).batch(9)
    copied = built(LOSS_MODELS["loss model, loss, scale"], activations, labels, LossInfo("cross_entropy", CLASSES))
    copied.load_state_dict(copy.deepcopy(predictor.state_dict()))
    assert torch.equal(predict(copied, activations, labels)[0], predict(predictor, activations, labels)[0])
