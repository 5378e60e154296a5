"""A model in three parts, each a stage, for tests that change one thing about it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sg import Boundary
from tests.models import CLASSES, FEATURES


class Blocks(pl.LightningModule):
    """Three parts with a boundary between each two, trained by SGD."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.cuts = nn.ModuleList(Boundary() for _ in parts[1:])

    def forward(self, x: Any) -> Any:
        for part, cut in zip(self.parts, self.cuts):
            x = cut(part(x))
        return self.parts[-1](x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), prog_bar=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def plain() -> Blocks:
    return Blocks(
        nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU()),
        nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.ReLU()),
        nn.Linear(16, CLASSES),
    )


def middle(part: nn.Module) -> Blocks:
    return Blocks(nn.Linear(FEATURES, 16), part, nn.Linear(16, CLASSES))
