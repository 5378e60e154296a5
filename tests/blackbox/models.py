"""Small models with black boxes that the tests share."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sg import BlackBox, Boundary
from lightning_sg.blackbox import ScoredBoundary

INPUTS, CONTROLS = 6, 3


def simulate(controls: np.ndarray) -> np.ndarray:
    """Sines and steps of the controls, ``(N, 3)`` to ``(N,)``; its steps have no derivative."""
    return np.sin(controls[:, 0]) * controls[:, 1] + np.round(4 * controls[:, 2]) / 4


class Controller(pl.LightningModule):
    """A policy before a simulator, with a goal for each sample; cut in two stages if ``cut``."""

    def __init__(self, plant: ScoredBoundary | None = None, cut: bool = False, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        first = [nn.Linear(INPUTS, 16), nn.Tanh(), *([Boundary()] if cut else [])]
        self.policy = nn.Sequential(*first, nn.Linear(16, CONTROLS))
        self.plant = BlackBox(noise=0.2) if plant is None else plant

    def costs(self, batch: Any) -> Tensor:
        """One for each row that goes into the simulator."""
        x, goal = batch
        controls, goal = self.plant(self.policy(x), goal)
        outcome = simulate(controls.numpy(force=True))
        return torch.as_tensor((outcome - goal.numpy(force=True)) ** 2, dtype=torch.float32)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.plant.loss(self.costs(batch))
        self.log("cost", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_cost", self.plant.loss(self.costs(batch)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


def goals(samples: int = 96) -> TensorDataset:
    """Inputs and the outcome that each asks for."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, INPUTS, generator=generator)
    return TensorDataset(x, torch.tanh(x[:, 0] - x[:, 1]))


def loader(batch_size: int = 16, samples: int = 96, shuffle: bool = False) -> DataLoader[Any]:
    return DataLoader(goals(samples), batch_size=batch_size, shuffle=shuffle)
