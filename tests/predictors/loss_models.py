"""Loss models of every kind, for the tests of heads and losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sg import HeadOptions, LossModelPredictor, OwnLoss, Tasks
from lightning_sg.predictors.base import LossInfo

SAMPLES, CLASSES = 6, 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def labels(*shape: int, classes: int = CLASSES) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(1))


def made(activations: Any, context: Any, traced: LossInfo | None = None, *, awake: bool = True, **options: Any) -> Any:
    """A built predictor; ``awake`` gives its last layers random weights instead of zeros."""
    torch.manual_seed(0)
    predictor = LossModelPredictor(**options)
    predictor.build(activations, context, traced)
    if awake:
        for head in predictor.heads:
            nn.init.normal_(head.net[-1].weight, std=0.3)
    return predictor


def own_loss(outputs: Tensor, context: Any) -> Tensor:
    return (outputs.flatten(1).sum(1) - context.flatten(1).float().sum(1)).square()


def own_mean(outputs: Tensor, context: Any) -> Tensor:
    return own_loss(outputs, context).mean()


FAMILIES: dict[str, tuple[tuple[tuple[int, ...], ...], Any, LossInfo | None, dict[str, Any]]] = {
    "convolutions": (((SAMPLES, 4, 9, 8),), labels(SAMPLES), None, {"head": HeadOptions(conv_layers=2, conv_width=8)}),
    "convolutions beside a vector": (
        ((SAMPLES, 4, 9, 8), (SAMPLES, 3)),
        labels(SAMPLES),
        None,
        {"head": HeadOptions(conv_layers=1)},
    ),
    "maps of two sizes": (
        ((SAMPLES, 4, 9, 8), (SAMPLES, 2, 4, 4)),
        labels(SAMPLES),
        None,
        {"head": HeadOptions(pooled_side=2)},
    ),
    "volumes": (((SAMPLES, 4, 5, 9, 8),), labels(SAMPLES), None, {"head": HeadOptions(pooled_side=2)}),
    "dense labels": (((SAMPLES, 4, 6, 5),), labels(SAMPLES, 12, 10), None, {}),
    "dense labels with a channel": (((SAMPLES, 4, 6, 5),), labels(SAMPLES, 1, 12, 10), None, {}),
    "dense labels, convolutions": (
        ((SAMPLES, 4, 6, 6),),
        labels(SAMPLES, 6, 6),
        None,
        {"head": HeadOptions(conv_layers=1)},
    ),
    "dense labels, two maps, a vector": (
        ((SAMPLES, 4, 6, 6), (SAMPLES, 2, 3, 3), (SAMPLES, 5)),
        labels(SAMPLES, 6, 6),
        None,
        {"head": HeadOptions(conv_layers=1)},
    ),
    "dense goals": (((SAMPLES, 4, 6, 6),), normal(SAMPLES, 2, 12, 12), None, {}),
    "dense binary labels": (((SAMPLES, 4, 6, 6),), labels(SAMPLES, 6, 6) > 0, None, {}),
    "a linear head on tokens": (((SAMPLES, 5, 7),), labels(SAMPLES, 5), None, {"layers": 0}),
    "goals of positions": (((SAMPLES, 5, 7),), normal(SAMPLES, 5, 2), None, {}),
    "a low rank": (
        ((SAMPLES, 5, 7),),
        labels(SAMPLES, 5, classes=40),
        None,
        {"layers": 0, "head": HeadOptions(rank=2)},
    ),
    "class probabilities": (((SAMPLES, 7),), normal(SAMPLES, 4).softmax(-1), LossInfo("cross_entropy", 4), {}),
    "binary labels": (((SAMPLES, 7),), labels(SAMPLES) > 0, None, {}),
    "l1": (((SAMPLES, 7),), normal(SAMPLES, 2), LossInfo("l1", 2), {}),
    "smooth l1": (((SAMPLES, 7),), normal(SAMPLES, 2), LossInfo("smooth_l1", 2, beta=0.3), {}),
    "huber": (((SAMPLES, 7),), normal(SAMPLES, 2), LossInfo("huber", 2, beta=0.3), {}),
    "smoothing": (((SAMPLES, 7),), labels(SAMPLES), LossInfo("cross_entropy", 3, label_smoothing=0.2), {}),
    "a loss by sample": (((SAMPLES, 7),), normal(SAMPLES, 2), None, {"own_loss": OwnLoss(own_loss, 2)}),
    "a mean loss": (((SAMPLES, 7),), normal(SAMPLES, 2), None, {"own_loss": OwnLoss(own_mean, 2)}),
    "a mean loss of cells": (((SAMPLES, 4, 6, 6),), labels(SAMPLES, 9, 9), None, {"own_loss": OwnLoss(own_mean, 2)}),
    "tasks": (
        ((SAMPLES, 7),),
        {"a": labels(SAMPLES), "b": normal(SAMPLES, 2)},
        None,
        {"tasks": Tasks(weights={"b": 0.5})},
    ),
}


families = pytest.mark.parametrize(("shapes", "context", "loss", "options"), FAMILIES.values(), ids=FAMILIES.keys())
