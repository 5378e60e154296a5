"""Input predictors, models and runs for tests of synthetic inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sg import Boundary, InputPredictor, SyntheticGradients
from tests.models import CLASSES, FEATURES, Classifier, loader, make_trainer


class Told(InputPredictor):
    """Says what a function of the batch says; learns nothing."""

    def __init__(self, say: Callable[[Tensor, list[tuple[int, ...]]], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.say = say

    def build(self, features: Tensor, shapes: list[tuple[int, ...]]) -> None:
        self.shapes = shapes

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        return self.say(features, self.shapes)

    def loss(self, features: Tensor, activations: tuple[Tensor, ...]) -> Tensor:
        return torch.zeros(())


def fit(module: pl.LightningModule, callback: SyntheticGradients, data: Any = None, **arguments: Any) -> pl.Trainer:
    pl.seed_everything(3, verbose=False)
    trainer = make_trainer(callbacks=[callback], **arguments)
    trainer.fit(module, data or loader(), loader(shuffle=False))
    return trainer


def classifier(stages: int = 4) -> Classifier:
    pl.seed_everything(3, verbose=False)
    return Classifier(stages)


class Masked(pl.LightningModule):
    """A mask crosses beside the activation; a model of another dtype, and batches that are dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cut, self.second = nn.Linear(FEATURES, 8), Boundary(), nn.Linear(8, CLASSES)
        self.masks: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        mask = batch["x"] > 0
        hidden, crossed = self.cut(torch.relu(self.first(batch["x"])), mask)
        assert torch.equal(mask, crossed)
        return F.cross_entropy(self.second(hidden), batch["labels"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def as_dict(samples: Any) -> dict[str, Tensor]:
    return {"labels": torch.stack([y for _x, y in samples]), "x": torch.stack([x for x, _y in samples])}
