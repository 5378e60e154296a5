"""A model whose layers look at each sample alone, and data that replicas share."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, Sampler
from torchmetrics.classification import MulticlassAccuracy

from lightning_sg import Boundary
from tests.models import CLASSES, FEATURES, dataset

SEED, BATCH = 3, 8  # samples of a batch in each replica


SAMPLES = 5 * 4 * BATCH  # a multiple of each number of replicas, so that no sampler pads


class Smooth(pl.LightningModule):
    """Its layers look at each sample alone, so the rest of the batch makes no difference."""

    def __init__(self, stages: int = 4, width: int = 10) -> None:
        super().__init__()
        sizes = [FEATURES, *[width] * (stages - 1)]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.Tanh(), Boundary()]
        self.net = nn.Sequential(*layers, nn.Linear(width, CLASSES))
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.log("val_accuracy", self.accuracy)
        self.log("val_loss", F.cross_entropy(logits, batch[1]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)


class TogetherSampler(Sampler[list[int]]):
    """Joins the batches that Lightning's samplers give to the replicas."""

    def __init__(self, replicas: int, epoch: int = 0) -> None:
        data = dataset(SAMPLES)
        self.samplers = [DistributedSampler(data, replicas, each, seed=SEED) for each in range(replicas)]
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.samplers[0]) // BATCH

    def __iter__(self) -> Iterator[list[int]]:
        for sampler in self.samplers:
            sampler.set_epoch(self.epoch)
        self.epoch += 1
        indices = [list(sampler) for sampler in self.samplers]
        for start in range(0, len(indices[0]), BATCH):
            yield [index for each in indices for index in each[start : start + BATCH]]


def data(replicas: int, devices: int, epoch: int = 0) -> dict[str, DataLoader[Any]]:
    """The loaders of a run with so many replicas, or of one process that gets all their batches."""
    if devices > 1:
        train: DataLoader[Any] = DataLoader(dataset(SAMPLES), batch_size=BATCH, shuffle=True)
        return {"train_dataloaders": train, "val_dataloaders": DataLoader(dataset(SAMPLES), batch_size=BATCH)}
    together: Any = DataLoader(dataset(SAMPLES), batch_sampler=TogetherSampler(replicas, epoch))
    return {
        "train_dataloaders": together,
        "val_dataloaders": DataLoader(dataset(SAMPLES), batch_size=BATCH * replicas),
    }
