"""Sequences with their channels second, as one-dimensional convolutions have them: predictors see positions second."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sg import AutoPredictor, LinearPredictor, LocalLoss, MLPPredictor, SyntheticGradients
from lightning_sg.lightning_api import pl
from lightning_sg.predictors.layout import Layout
from tests.models import assert_same_state, make_trainer, state_of
from tests.ranks import run_ranks
from tests.traced import traced

SAMPLES, INPUTS, CHANNELS, LENGTH, CLASSES = 16, 3, 6, 20, 4


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def convolution(inputs: int, **options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(inputs, CHANNELS, 3, padding=1, **options), nn.BatchNorm1d(CHANNELS), nn.GELU())


class Waves(pl.LightningModule):
    """Convolves series; the boundary is before or after their dimensions are swapped to and fro."""

    def __init__(self, dense: bool = False, swapped: bool = False) -> None:
        super().__init__()
        self.dense = dense
        self.first = nn.Sequential(convolution(INPUTS), *([Transposed()] if swapped else []))
        self.second = nn.Sequential(*([Transposed()] if swapped else []), convolution(CHANNELS))
        self.head = nn.Conv1d(CHANNELS, CLASSES, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, dense = batch
        logits = self.head(self.second(self.first(x)))
        return F.cross_entropy(logits, dense) if self.dense else F.cross_entropy(logits.mean(-1), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(samples: int = 5 * SAMPLES) -> DataLoader[Any]:
    made = torch.Generator().manual_seed(0)
    x = torch.randn(samples, INPUTS, LENGTH, generator=made)
    labels = torch.randint(CLASSES, (samples,), generator=made)
    dense = torch.randint(CLASSES, (samples, LENGTH), generator=made)
    return DataLoader(TensorDataset(x, labels, dense), SAMPLES)


def layout_after(first: nn.Module, *shape: int) -> Layout:
    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = first, nn.Linear(1, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.second(self.first(batch).sum().reshape(1, 1)).sum()

    return traced(Model(), torch.randn(shape), ["first"]).layouts["first"]


class Permuted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 1).contiguous()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv1d(INPUTS, INPUTS, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + 0.5 * self.inner(x))


CHANNELS_SECOND: dict[str, Callable[[], nn.Module]] = {
    "a convolution": lambda: nn.Conv1d(INPUTS, 8, 3),
    "and what is behind it": lambda: nn.Sequential(nn.Conv1d(INPUTS, 8, 3), nn.ReLU(), nn.Dropout(), nn.MaxPool1d(2)),
    "a normalisation": lambda: nn.BatchNorm1d(INPUTS),
    "groups": lambda: nn.Sequential(nn.GroupNorm(1, INPUTS), nn.SiLU()),
    "a shortcut": Residual,
    "a transposed convolution": lambda: nn.ConvTranspose1d(INPUTS, 4, 2, stride=2),
    "attention swapped back": lambda: nn.Sequential(Permuted(), nn.Linear(INPUTS, 5), Transposed()),
}
POSITIONS_SECOND: dict[str, Callable[[], nn.Module]] = {
    "a linear layer": lambda: nn.Linear(LENGTH, 8),
    "a recurrent layer": lambda: nn.Sequential(nn.GRU(LENGTH, 8, batch_first=True), First()),
    "a convolution swapped": lambda: nn.Sequential(nn.Conv1d(INPUTS, 8, 3), nn.ReLU(), Transposed()),
    "an encoder": lambda: nn.TransformerEncoderLayer(LENGTH, 2, 16, batch_first=True),
    "vectors": lambda: nn.Sequential(nn.Conv1d(INPUTS, 8, 3), nn.Flatten()),
    "maps": lambda: nn.Sequential(nn.Unflatten(2, (4, 5)), nn.Conv2d(INPUTS, 4, 3)),
}


class First(nn.Module):
    def forward(self, both: tuple[Tensor, Tensor]) -> Tensor:
        return both[0]


@pytest.mark.parametrize("name", CHANNELS_SECOND)
def test_channels_are_second(name: str) -> None:
    assert layout_after(CHANNELS_SECOND[name](), SAMPLES, INPUTS, LENGTH) == Layout(frozenset({0}))


@pytest.mark.parametrize("name", POSITIONS_SECOND)
def test_positions_are_second(name: str) -> None:
    assert layout_after(POSITIONS_SECOND[name](), SAMPLES, INPUTS, LENGTH) == Layout()


PREDICTORS: dict[str, Callable[[], Any]] = {
    "auto": AutoPredictor,
    "local loss": lambda: LocalLoss(16),
    "direct": lambda: MLPPredictor(16, conditional=False),
    "linear": lambda: LinearPredictor(conditional=False),
}


@pytest.mark.parametrize("dense", [False, True], ids=["a label for each series", "a label for each position"])
@pytest.mark.parametrize("name", PREDICTORS)
def test_a_predictor_sees_the_same_wherever_the_dimensions_are_swapped(name: str, dense: bool) -> None:
    ends = []
    for swapped in (False, True):
        pl.seed_everything(1, verbose=False)
        model = Waves(dense, swapped)
        callback = SyntheticGradients(boundaries=["first"], predictor=PREDICTORS[name]())
        make_trainer(callbacks=[callback], max_epochs=2).fit(model, data())
        ends.append([*model.parameters()])
        if name == "auto":
            (trainer,) = callback.trainers.values()
            words = trainer.predictor.describe()
            assert ("label for each position" in words) == dense
            assert f"{CLASSES} classes" in words
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other)


def train(devices: int) -> dict[str, Tensor]:
    pl.seed_everything(1, verbose=False)
    model = Waves(dense=True)
    strategy = "synthetic_gradients" if devices > 1 else "auto"
    callback = SyntheticGradients(boundaries=["first"])
    make_trainer(callbacks=[callback], devices=devices, strategy=strategy).fit(model, data())
    return state_of(model)


def test_two_processes_equal_one() -> None:
    two = run_ranks(2, partial(train, 2))
    assert_same_state(two[0], train(1))
