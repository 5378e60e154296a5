"""Several tasks in one context."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_sg import Tasks
from lightning_sg.predictors.base import LossInfo
from tests.predictors.loss_models import SAMPLES, labels, made, normal


def test_the_loss_of_tasks_is_the_weighted_sum_of_single_ones() -> None:
    activations = (normal(SAMPLES, 7),)
    context = {"digit": labels(SAMPLES), "size": normal(SAMPLES, 2), "name": ["x"] * SAMPLES}
    predictor = made(
        activations,
        context,
        tasks=Tasks(losses={"digit": "cross_entropy", "size": "l1"}, weights={"size": 0.5}),
        classes={"digit": 5},
    )
    assert [head.net[-1].out_features for head in predictor.heads] == [5, 2]
    value, gradient = torch.zeros(()), torch.zeros(SAMPLES, 7)
    for place, (name, kind, weight) in enumerate([("digit", "cross_entropy", 1.0), ("size", "l1", 0.5)]):
        single = made(activations, context[name], LossInfo(kind, 5))
        single.heads[0].load_state_dict(predictor.heads[place].state_dict())
        value = value + weight * single.loss(activations, context[name], ())
        gradient = gradient + weight * single(activations, context[name])[0]
    torch.testing.assert_close(predictor.loss(activations, context, ()), value)
    torch.testing.assert_close(predictor(activations, context)[0], gradient)


def test_the_models_cross_entropy_is_that_of_the_only_task_with_labels() -> None:
    context = {"a": labels(SAMPLES), "b": normal(SAMPLES)}
    predictor = made((normal(SAMPLES, 7),), context, LossInfo("cross_entropy", 9))
    assert [head.net[-1].out_features for head in predictor.heads] == [9, 1]


@pytest.mark.parametrize(
    ("options", "context", "message"),
    [
        ({"tasks": Tasks(losses={"c": "mse"})}, {"a": labels(SAMPLES)}, "no tensors called .'c'."),
        ({"tasks": Tasks(weights={"c": 1.0})}, {"a": labels(SAMPLES)}, "given for .'c'."),
        ({"tasks": Tasks(losses={"a": "mse"})}, labels(SAMPLES), "context is a tensor"),
        ({"classes": {"a": 3}}, labels(SAMPLES), "no dict of tasks"),
        ({"classes": {"a": 1}}, {"a": labels(SAMPLES)}, r"classes=\{'a'"),
        ({}, labels(SAMPLES, 5), "neither one for each sample nor one for each position"),
    ],
)
def test_contexts_and_options_that_do_not_fit_are_refused(options: Any, context: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made((normal(SAMPLES, 7),), context, **options)


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="losses must be among"):
        Tasks(losses={"a": "hinge"})  # type: ignore[dict-item]
