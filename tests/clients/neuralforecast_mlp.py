"""neuralforecast: it imports ``pytorch_lightning``, cuts windows out of the batch at random, and masks its loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from neuralforecast import NeuralForecast
from neuralforecast.models import MLP

from tests.clients.client import Client
from tests.clients.series import SEASON, table


class Perceptron(Client):
    """An MLP by ``NeuralForecast.fit``, cut after its first layer."""

    boundaries = ("mlp.0",)
    context = 'batch["temporal"]'
    epochs = 40
    long = 200
    lightning = pl

    def fit(self, **trainer: Any) -> None:
        steps = trainer.pop("max_epochs")  # an epoch is one batch: all series
        model = MLP(
            h=6,
            input_size=2 * SEASON,
            hidden_size=32,
            max_steps=steps,
            random_seed=self.seed,
            learning_rate=1e-3,
            windows_batch_size=32,
            scaler_type="standard",
            enable_checkpointing=False,
            **trainer,
        )
        self.forecast = NeuralForecast(models=[model], freq="D")
        frame = table().rename(columns={"group": "unique_id", "date": "ds", "value": "y"})
        self.forecast.fit(frame[["unique_id", "ds", "y"]])
        self.network = self.forecast.models[0]

    def save(self, path: Path) -> None:
        self.forecast.save(str(path), overwrite=True)

    def load(self, path: Path) -> Any:
        return NeuralForecast.load(str(path)).models[0]
