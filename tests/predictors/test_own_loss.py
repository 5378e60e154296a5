"""Losses that the user gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sg import LossModelPredictor, OwnLoss, Tasks
from tests.predictors.loss_models import SAMPLES, labels, made, normal, own_loss, own_mean


@pytest.mark.parametrize("function", [own_loss, own_mean])
def test_a_users_loss_has_its_gradient(function: Any) -> None:
    hidden, goal = normal(SAMPLES, 7), normal(SAMPLES, 2)
    predictor = made((hidden,), goal, own_loss=OwnLoss(function, 2))
    hidden.requires_grad_()
    (expected,) = torch.autograd.grad(own_loss(predictor.head(hidden), goal).sum(), hidden)
    torch.testing.assert_close(predictor((hidden,), goal)[0], expected)


def test_a_users_loss_has_any_context() -> None:
    def by_length(outputs: Tensor, context: Any) -> Tensor:
        return (outputs[:, 0] - torch.tensor([float(len(text)) for text in context])).square()

    activations, context = (normal(3, 7),), ["a", "bb", "ccc"]
    predictor = made(activations, context, own_loss=OwnLoss(by_length, 1))
    assert predictor(activations, context)[0].abs().sum() > 0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda outputs, context: outputs,
            rf"must return the losses of the {SAMPLES} samples.*returned \({SAMPLES}, 2\)",
        ),
        (lambda outputs, context: 1.0, "it returned float"),
        (lambda outputs, context: outputs.detach().sum(), "without a gradient"),
    ],
)
def test_a_users_loss_that_returns_something_else_is_refused(function: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made((normal(SAMPLES, 7),), labels(SAMPLES), own_loss=OwnLoss(function, 2))


def test_a_loss_of_the_users_is_given_by_its_import_path() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(LossModelPredictor, "predictor")
    given = parser.parse_object(
        {
            "predictor": {
                "own_loss": {"function": "torch.nn.functional.mse_loss", "outputs": 2},
                "classes": None,
                "matching": {"measure": "cosine"},
            }
        }
    )
    predictor = parser.instantiate(given).predictor
    assert predictor.own_loss.function is F.mse_loss
    assert predictor.matching.measure == "cosine"
    given = parser.parse_object(
        {"predictor": {"own_loss": {"function": {"class_path": "torch.nn.L1Loss"}, "outputs": 2}}}
    )
    assert isinstance(parser.instantiate(given).predictor.own_loss.function, nn.L1Loss)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"function": own_loss}, TypeError, "outputs"),
        ({"outputs": 3}, TypeError, "function"),
        ({"function": own_loss, "outputs": 0}, ValueError, "outputs must be a whole number from 1"),
        ({"function": 3, "outputs": 3}, TypeError, "must be a function"),
    ],
)
def test_an_own_loss_needs_a_function_and_outputs(arguments: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        OwnLoss(**arguments)


@pytest.mark.parametrize(
    "options", [{"classes": 2}, {"tasks": Tasks(losses={"a": "mse"})}, {"tasks": Tasks(weights={"a": 2.0})}]
)
def test_an_own_loss_excludes_classes_and_tasks(options: Any) -> None:
    with pytest.raises(ValueError, match="own_loss replaces classes and tasks"):
        LossModelPredictor(own_loss=OwnLoss(own_loss, 2), **options)
