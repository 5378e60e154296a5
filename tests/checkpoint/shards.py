"""A run whose checkpoint is in shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_sg import PredictorTraining, SyntheticGradients, SyntheticGradientStrategy
from tests.models import Classifier, loader, make_trainer, state_of


def train(
    devices: int,
    folder: Path,
    checkpoint: str | None = None,
    epochs: int = 2,
    how: str = "sharded",
    make: Any = Classifier,
) -> dict[str, Tensor]:
    pl.seed_everything(3, verbose=False)
    module = make()
    trainer = make_trainer(
        strategy=SyntheticGradientStrategy(checkpoint=how, timeout=30) if devices > 1 else "auto",
        devices=devices,
        callbacks=[SyntheticGradients(training=PredictorTraining(seed=2))],
        max_epochs=epochs,
        default_root_dir=folder,
    )
    trainer.fit(module, loader(shuffle=False), ckpt_path=checkpoint)
    trainer.save_checkpoint(folder / "last.ckpt")
    return state_of(module)
