"""gluonts: DeepAR, whose loss is the likelihood of a distribution that the network has the parameters of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from gluonts.dataset.common import ListDataset
from gluonts.model.predictor import Predictor
from gluonts.torch.model.deepar import DeepAREstimator

from tests.clients.client import Client
from tests.clients.series import SEASON, series


class DeepAR(Client):
    """DeepAR by its estimator, which makes the module, the loader and the Trainer; cut after the LSTM."""

    boundaries = ("model.rnn",)
    context = 'batch["future_target"]'
    lightning = pl

    def fit(self, **trainer: Any) -> None:
        np.random.seed(self.seed)  # windows are drawn by numpy
        estimator = DeepAREstimator(
            freq="D",
            prediction_length=6,
            context_length=SEASON,
            hidden_size=16,
            dropout_rate=0.0,
            lags_seq=[1, 2, 3, SEASON],
            batch_size=16,
            num_batches_per_epoch=10,
            trainer_kwargs=trainer,
        )
        data = ListDataset([{"start": "2020-01-01", "target": values} for values in series()], freq="D")
        output = estimator.train_model(data)
        self.predictor, self.network, self.trainer = output.predictor, output.trained_net, output.trainer

    def save(self, path: Path) -> None:
        if self.trainer.global_rank == 0:  # the network is whole in every process
            path.mkdir()
            self.predictor.serialize(path)

    def load(self, path: Path) -> Any:
        return Predictor.deserialize(path).prediction_net
