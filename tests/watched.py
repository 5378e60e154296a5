"""Some steps of training under a callback that watches them, for what must hold with every kind of callback of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_sg import (
    AlignmentGuard,
    Chunks,
    ExactGradients,
    LinearPredictor,
    LocalLoss,
    PredictorTraining,
    SyntheticGradients,
    SyntheticInputs,
    ThroughTime,
)
from tests.models import make_trainer
from tests.recurrent_models import CHUNK, LENGTH, sequences

Make = Callable[[], SyntheticGradients]
COUPLES = "a guard that couples"
CALLBACKS: dict[str, Make] = {
    "by default": SyntheticGradients,
    "linear": lambda: SyntheticGradients(predictor=LinearPredictor()),
    "local loss": lambda: SyntheticGradients(predictor=LocalLoss()),
    "exact gradients": lambda: SyntheticGradients(exact=ExactGradients(every=2, correction=0.5)),
    "two steps of delay": lambda: SyntheticGradients(delay=2),
    COUPLES: lambda: SyntheticGradients(guard=AlignmentGuard(fallback="couple", patience=1)),
    "synthetic inputs": lambda: SyntheticGradients(inputs=SyntheticInputs()),
    "random updates": lambda: SyntheticGradients(training=PredictorTraining(update_probability=0.5)),
}


def in_time(settings: ThroughTime) -> SyntheticGradients:
    """For boundaries in time."""
    predictor = LinearPredictor(conditional=False, normalize="none")
    return SyntheticGradients(predictor=predictor, through_time=settings)


def chunks() -> Chunks:
    """Data for a network with boundaries in time."""
    return Chunks(sequences(4), CHUNK, sequence_length=LENGTH)


def train_watched(watch: Callback, devices: int, make: Make, module: pl.LightningModule, data: Any, steps: int) -> None:
    """Trains for so many steps; the watch comes after the callback that is watched."""
    trainer = make_trainer(
        strategy="synthetic_gradients" if devices > 1 else "auto",
        devices=devices,
        callbacks=[make(), watch],
        max_steps=steps,
        max_epochs=-1,
        log_every_n_steps=1000,
    )
    trainer.fit(module, data)
