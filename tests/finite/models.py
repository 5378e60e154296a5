"""Runs in which one batch is not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_sg import Boundary, SyntheticGradients
from tests.everywhere import trainer_for
from tests.models import CLASSES, FEATURES, dataset, make_trainer, state_of
from tests.ranks import run_ranks

BAD = 3  # the batch that is not finite


class Stages(pl.LightningModule):
    """Three stages with BatchNorm, of which one does something wrong at batch ``BAD``."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.fault = fault
        self.first = nn.Linear(FEATURES, 16)
        self.norm = nn.BatchNorm1d(16)
        self.cut = Boundary()
        self.second = nn.Linear(16, 16)
        self.cut2 = Boundary()
        self.third = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, CLASSES))

    def at(self, fault: str, batch_idx: int) -> bool:
        return self.fault == fault and batch_idx == BAD and self.current_epoch == 0

    def spoil(self, fault: str, batch_idx: int, h: Tensor) -> Tensor:
        """Makes the values, or with ``gradient`` in the name only the gradients, infinite."""
        if self.at(fault, batch_idx):
            return h * float("nan")
        if self.at(f"{fault} gradient", batch_idx):
            return h + 1e-30 * torch.sqrt(h * 0)
        return h

    def hidden(self, x: Tensor, batch_idx: int) -> Tensor:
        h = self.cut(torch.relu(self.spoil("first", batch_idx, self.norm(self.first(x)))))
        h = self.cut2(torch.tanh(self.spoil("second", batch_idx, self.second(h))))
        return self.spoil("third", batch_idx, self.third(h))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.hidden(batch[0], batch_idx), batch[1])
        if self.at("constant", batch_idx):  # its gradients are finite
            return loss + torch.tensor(float("inf"))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.hidden(batch[0], -1), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2, weight_decay=0.1)


class NaNData:
    """The shared data set, in which one sample has a NaN."""

    def __init__(self, batch: int | None = BAD, size: int = 10) -> None:
        self._data = dataset()
        self._bad = None if batch is None else batch * size + 1

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self._data[index]
        return (x * float("nan") if index == self._bad else x), y


def data(bad: int | None = None) -> DataLoader[Any]:
    """Seven batches of ten, of which one may have a NaN."""
    return DataLoader(NaNData(bad), batch_size=10)  # type: ignore[arg-type]


def failure(
    make: Callable[[], pl.LightningModule], devices: int = 1, bad: int | None = None, **callback: Any
) -> list[Any]:
    """What each rank raised, and the newest state of the module there."""

    def work() -> Any:
        pl.seed_everything(1, verbose=False)
        module = make()
        if devices > 1:
            trainer = trainer_for(devices, [SyntheticGradients(**callback)])
        else:
            trainer = make_trainer(callbacks=[SyntheticGradients(**callback)])
        try:
            trainer.fit(module, data(bad))
        except Exception as error:
            state = {name: tensor for name, tensor in state_of(module).items() if tensor.device.type != "meta"}
            return error.__class__.__name__, str(error), trainer.global_step, state
        return "", "", trainer.global_step, state_of(module)

    return run_ranks(devices, work) if devices > 1 else [work()]
