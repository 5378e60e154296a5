"""Two stages for the tests of errors, and what each rank of a run raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sg import Boundary, SyntheticGradients, SyntheticGradientStrategy
from tests.models import CLASSES, FEATURES, loader, make_trainer
from tests.ranks import run_ranks


class Stages(pl.LightningModule):
    """Two linear stages; subclasses do something wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cut, self.second = nn.Linear(FEATURES, 8), Boundary(), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.cut(torch.relu(self.first(x))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit_one(module: pl.LightningModule, data: Any = None, **callback: Any) -> None:
    pl.seed_everything(1, verbose=False)
    make_trainer(callbacks=[SyntheticGradients(**callback)]).fit(module, data or loader())


def fit_split(
    make: Callable[[], pl.LightningModule],
    devices: int = 2,
    timeout: float = 20.0,
    data: Callable[[], Any] = loader,
    **arguments: Any,
) -> list[Any]:
    """Fits in several processes and returns each rank's :class:`Failure`, or ``None`` where it ended well."""

    def work() -> None:
        pl.seed_everything(1, verbose=False)
        strategy = SyntheticGradientStrategy(timeout=timeout)
        make_trainer(strategy=strategy, devices=devices, **arguments).fit(make(), data())

    return run_ranks(devices, work, may_fail=True)
