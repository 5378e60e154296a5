"""A model of two stages and a run of it, for tests that change one thing about its step."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sg import Boundary, SyntheticGradients, SyntheticGradientStrategy
from tests.models import CLASSES, FEATURES, loader, make_trainer, state_of
from tests.ranks import run_ranks


class Two(pl.LightningModule):
    """Two stages."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cut, self.second = nn.Linear(FEATURES, 16), Boundary(), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.cut(torch.relu(self.first(x))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def fit(kind: type[pl.LightningModule], devices: int = 1, data: Any = None, **arguments: Any) -> Any:
    """Fits and returns the state, on each rank; in one process, the state."""
    callback = arguments.pop("callback", {})

    def work() -> Any:
        pl.seed_everything(2, verbose=False)
        module = kind()
        strategy = SyntheticGradientStrategy(timeout=15.0) if devices > 1 else "auto"
        extra = arguments.get("callbacks", [])
        trainer = make_trainer(
            **{**arguments, "callbacks": [SyntheticGradients(**callback), *extra]}, devices=devices, strategy=strategy
        )
        trainer.fit(module, data() if data else loader(shuffle=False), loader(shuffle=False))
        return state_of(module)

    return run_ranks(devices, work, may_fail=True) if devices > 1 else work()
