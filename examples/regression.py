"""Regression on a table, in the manner of house prices: data made on the spot or from scikit-learn, and an MLP."""

from __future__ import annotations

import math
from typing import Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sg import Boundary

FEATURES, DIABETES_FEATURES = 8, 10

Batch = tuple[Tensor, Tensor]


class Housing(pl.LightningDataModule):
    """A table of numbers and one number to predict: 70 % to train on, 10 % to validate, 20 % to test.

    Features and targets are standardised. Data and split are the same in every run.

    Args:
        source: ``"generated"``: districts with eight features, as those of California housing are, and prices with
            interactions and noise; nothing is downloaded. ``"diabetes"``: scikit-learn's 442 patients, ten features.
        samples: How many to generate; of no effect for ``"diabetes"``.
        batch_size: Samples in a training batch.
        seed: Seeds the generated data and the split; it has nothing to do with the seed of the training.
    """

    def __init__(
        self,
        source: Literal["generated", "diabetes"] = "generated",
        samples: int = 20000,
        batch_size: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if source not in ("generated", "diabetes"):
            raise ValueError(f"source must be 'generated' or 'diabetes', not {source!r}.")
        if samples < 10:
            raise ValueError(f"Housing needs at least 10 samples to split them, not {samples}.")
        self.source = source
        self.samples = samples
        self.batch_size = batch_size
        self.seed = seed

    def setup(self, stage: str) -> None:
        """Makes the three sets.

        Raises:
            ModuleNotFoundError: If ``source`` is ``"diabetes"`` and scikit-learn is not installed.
        """
        generator = torch.Generator().manual_seed(self.seed)
        x, y = districts(self.samples, generator) if self.source == "generated" else _diabetes()
        places = torch.randperm(len(y), generator=generator)
        train, validation, test = places.split([n := len(y) * 7 // 10, v := len(y) // 10, len(y) - n - v])
        x, y = _standard(x, train), _standard(y, train)
        self.train = TensorDataset(x[train], y[train])
        self.validation = TensorDataset(x[validation], y[validation])
        self.test = TensorDataset(x[test], y[test])

    def train_dataloader(self) -> DataLoader[Batch]:
        """The training set, in a new order each epoch."""
        # BatchNorm cannot train on the lone sample that some batch sizes would leave over.
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The validation set in one batch."""
        return DataLoader(self.validation, len(self.validation))

    def test_dataloader(self) -> DataLoader[Batch]:
        """The test set in one batch."""
        return DataLoader(self.test, len(self.test))


def districts(samples: int, generator: torch.Generator) -> Batch:
    """Districts and their prices, made up: what matters is that no feature tells the price on its own.

    Args:
        samples: How many.
        generator: Draws them.

    Returns:
        ``(samples, 8)`` features (income, age, rooms, bedrooms, people, people in a household, latitude, longitude) and
        ``(samples,)`` prices.
    """

    def normal() -> Tensor:
        return torch.randn(samples, generator=generator)

    income = (0.5 * normal()).exp()
    age = torch.rand(samples, generator=generator)
    rooms = (0.3 * normal()).exp() * income.sqrt()
    bedrooms = (rooms + 0.2 * normal()).clamp_min(0.2).sqrt()
    people = normal()
    household = (0.4 * normal() - 0.2 * income).exp()
    latitude, longitude = 2 * torch.rand(2, samples, generator=generator) - 1
    # Two towns and a coast: land is worth more near them, and income counts for more there.
    towns = sum(
        height * (-((latitude - north).square() + (longitude - east).square()) / width).exp()
        for north, east, width, height in ((0.5, -0.4, 0.1, 1.5), (-0.6, 0.3, 0.2, 1.0))
    )
    coast = torch.sigmoid(6 * (longitude + 0.4 * torch.sin(4 * latitude) - 0.5))
    price = (
        income * (0.6 + towns)
        + 0.8 * torch.tanh(rooms - household)
        + coast * (1 + torch.sin(5 * age))
        - 0.5 * household * people.square() / (1 + income)
        + 0.4 * torch.sin(3 * bedrooms * age)
        + 0.3 * normal()
    )
    return torch.stack([income, age, rooms, bedrooms, people, household, latitude, longitude], dim=1), price


def _diabetes() -> Batch:
    from sklearn.datasets import load_diabetes  # here: the generated data do without scikit-learn

    x, y = load_diabetes(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)


def _standard(values: Tensor, train: Tensor) -> Tensor:
    """Zero mean and unit variance on the training set, which is all that may be looked at."""
    seen = values[train]
    return (values - seen.mean(0)) / seen.std(0)


class RegressionMLP(pl.LightningModule):
    """Hidden layers of Linear, BatchNorm and ReLU, cut into stages of about as many layers each.

    Args:
        features: Of the table: 8 generated ones, or 10 for diabetes.
        hidden_layers: Number of hidden layers.
        width: Width of each.
        stages: Number of stages; there is a boundary between each two.
        learning_rate: Adam's at the start; it falls to zero along a cosine.
    """

    def __init__(
        self,
        features: int = FEATURES,
        hidden_layers: int = 3,
        width: int = 128,
        stages: int = 3,
        learning_rate: float = 1e-3,
    ) -> None:
        super().__init__()
        if not 1 <= stages <= hidden_layers + 1:
            raise ValueError(
                f"{hidden_layers} hidden layers and the output make 1 to {hidden_layers + 1} stages, not {stages}."
            )
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        # Rounded down: the output layer counts as one, and goes with the last stage.
        ends = {math.floor((hidden_layers + 1) * stage / stages) for stage in range(1, stages)}
        layers: list[nn.Module] = []
        for number in range(1, hidden_layers + 1):
            inputs = features if number == 1 else width
            layers += [nn.Linear(inputs, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
            if number in ends:
                layers.append(Boundary())
        self.net = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Features ``(N, D)`` to predictions ``(N,)``."""
        return self.net(x).squeeze(-1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The squared error of one batch."""
        loss = self.squared_error(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The squared error on the validation set: 1 is what the mean of all prices would give."""
        self.log("val_loss", self.squared_error(batch), prog_bar=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """The squared error on the test set."""
        self.log("test_loss", self.squared_error(batch))

    def squared_error(self, batch: Batch) -> Tensor:
        """The mean squared error: of targets ``(N,)`` or ``(N, 1)``."""
        x, y = batch
        return F.mse_loss(self(x), y.flatten())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam on everything, its rate falling to zero."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
