"""Handwritten digits of 8 x 8 pixels, from scikit-learn: no download, and trained in seconds."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_sg import Boundary

PIXELS, CLASSES = 64, 10

Batch = tuple[Tensor, Tensor]


class Digits(pl.LightningDataModule):
    """scikit-learn's 1797 digits: 1257 to train on, 270 to validate and 270 to test.

    The split is the same in every run.

    Args:
        batch_size: Samples in a batch.
    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        """Makes the three sets."""
        images, labels = load_digits(return_X_y=True)
        x = torch.tensor(images, dtype=torch.float32) / 16  # pixels are 0 to 16
        y = torch.tensor(labels)
        rest, test = train_test_split(torch.arange(len(y)), test_size=270, random_state=0, stratify=y)
        train, validation = train_test_split(rest, test_size=270, random_state=0, stratify=y[rest])
        self.train = TensorDataset(x[train], y[train])
        self.validation = TensorDataset(x[validation], y[validation])
        self.test = TensorDataset(x[test], y[test])

    def train_dataloader(self) -> DataLoader[Batch]:
        """All of the training set, in a new order each epoch."""
        # BatchNorm cannot train on the lone sample that some batch sizes would leave over.
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The validation set in one batch."""
        return DataLoader(self.validation, len(self.validation))

    def test_dataloader(self) -> DataLoader[Batch]:
        """The test set in one batch."""
        return DataLoader(self.test, len(self.test))


def block(inputs: int, outputs: int) -> nn.Sequential:
    """Linear, BatchNorm and ReLU; a bias would be undone by the BatchNorm."""
    return nn.Sequential(nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU())


class DigitsClassifier(pl.LightningModule):
    """Blocks of Linear, BatchNorm and ReLU, cut into stages of about as many blocks each.

    Args:
        depth: Number of blocks.
        width: Width of each block.
        stages: Number of stages; there is a boundary between each two.
        learning_rate: Adam's.
    """

    def __init__(self, depth: int = 4, width: int = 256, stages: int = 2, learning_rate: float = 1e-3) -> None:
        super().__init__()
        if not 1 <= stages <= depth:
            raise ValueError(f"{depth} blocks make 1 to {depth} stages, not {stages}.")
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        # Rounded up: the first block is small, for it sees only 64 pixels.
        ends = {math.ceil(depth * stage / stages) for stage in range(1, stages)}
        layers: list[nn.Module] = []
        for number in range(1, depth + 1):
            layers.append(block(PIXELS if number == 1 else width, width))
            if number in ends:
                layers.append(Boundary())
        self.net = nn.Sequential(*layers, nn.Linear(width, CLASSES))
        self.val_accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.test_accuracy = MulticlassAccuracy(CLASSES, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(N, 64)`` to logits ``(N, 10)``."""
        return self.net(x)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one batch."""
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss and accuracy on the validation set."""
        x, y = batch
        logits = self(x)
        self.val_accuracy(logits, y)
        self.log("val_loss", F.cross_entropy(logits, y), sync_dist=True)  # over replicas, where there are any
        self.log("val_accuracy", self.val_accuracy, prog_bar=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Accuracy on the test set."""
        x, y = batch
        self.test_accuracy(self(x), y)
        self.log("test_accuracy", self.test_accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on everything: each process steps only its own stages' parameters."""
        # Fused: on a CPU, one pass over the weights instead of several, which wide layers feel.
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate, fused=True)
