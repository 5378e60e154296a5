"""The model's own loss, as a traced step finds it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sg.predictors.base import LossInfo
from tests.partition.models import CLASSES, SAMPLES, WIDTH, Cut, Loss, linears, trace


def mse(output: Tensor, labels: Tensor) -> Tensor:
    return F.mse_loss(output, torch.zeros_like(output))


def marks(output: Tensor, labels: Tensor) -> Tensor:
    return nn.BCEWithLogitsLoss()(output, torch.ones_like(output))


def chances(output: Tensor, labels: Tensor) -> Tensor:
    return nn.BCELoss()(output.sigmoid(), torch.ones_like(output))


nn_losses: dict[str, Loss] = {
    "smooth_l1": lambda output, labels: nn.SmoothL1Loss(beta=0.5)(output, torch.zeros_like(output)),
    "huber": lambda output, labels: nn.HuberLoss(delta=2.0)(output, torch.zeros_like(output)),
}


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (F.cross_entropy, LossInfo("cross_entropy", CLASSES)),
        (nn.CrossEntropyLoss(ignore_index=7), LossInfo("cross_entropy", CLASSES, 7)),
        (lambda output, labels: F.nll_loss(output.log_softmax(-1), labels), LossInfo("cross_entropy", CLASSES)),
        (mse, LossInfo("mse", CLASSES)),
        (marks, LossInfo("binary_cross_entropy", CLASSES)),
        (chances, LossInfo("binary_cross_entropy", CLASSES)),
        (lambda output, labels: mse(output.mean(1), labels), LossInfo("mse", 1)),
        (lambda output, labels: F.l1_loss(output, output.detach()), LossInfo("l1", CLASSES)),
        (nn_losses["smooth_l1"], LossInfo("smooth_l1", CLASSES, beta=0.5)),
        (nn_losses["huber"], LossInfo("huber", CLASSES, beta=2.0)),
        (nn.CrossEntropyLoss(label_smoothing=0.1), LossInfo("cross_entropy", CLASSES, label_smoothing=0.1)),
        (
            lambda output, labels: F.cross_entropy(output, labels, None, None, 5),
            LossInfo("cross_entropy", CLASSES, 5),
        ),
        (lambda output, labels: output.square().mean(), None),
        (lambda output, labels: F.cross_entropy(output, labels) + mse(output, labels), LossInfo("cross_entropy", 3)),
    ],
    ids=[
        "cross_entropy",
        "ignore_index",
        "nll",
        "mse",
        "bce",
        "bce of chances",
        "one number a sample",
        "l1",
        "smooth_l1",
        "huber",
        "smoothing",
        "positional",
        "unknown",
        "the first of two",
    ],
)
def test_the_models_own_loss_is_found(loss: Loss, expected: LossInfo | None) -> None:
    assert trace(linears(loss=loss)).loss == expected


def test_the_classes_of_a_loss_over_positions_are_its_second_dimension() -> None:
    module = Cut(nn.Linear(4, WIDTH), nn.Linear(WIDTH, CLASSES), loss=lambda h, y: F.cross_entropy(h.mT, y))
    batch = torch.randn(SAMPLES, 7, 4), torch.zeros(SAMPLES, 7, dtype=torch.int64)
    assert trace(module, batch).loss == LossInfo("cross_entropy", CLASSES)


def test_a_loss_before_the_last_boundary_is_not_the_models_own() -> None:
    class Auxiliary(Cut):
        def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
            hidden = self.parts[0](batch[0])
            mse(hidden, batch[1])
            return self.loss(self.parts[1](self.cuts[0](hidden)), batch[1])

    traced = trace(Auxiliary(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)))
    assert traced.loss == LossInfo("cross_entropy", CLASSES)
