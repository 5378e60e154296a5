"""darts: it imports ``pytorch_lightning``, and its models make their own module, loader and Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from darts import TimeSeries
from darts.models import BlockRNNModel

from tests.clients.client import Client
from tests.clients.series import SEASON, series


class Recurrent(Client):
    """A block RNN by its own ``fit``, cut after the LSTM."""

    boundaries = ("rnn",)
    context = "batch"
    lightning = pl

    def fit(self, **trainer: Any) -> None:
        self.model = BlockRNNModel(
            input_chunk_length=2 * SEASON,
            output_chunk_length=6,
            model="LSTM",
            hidden_dim=16,
            batch_size=16,
            n_epochs=trainer.pop("max_epochs"),
            random_state=self.seed,
            pl_trainer_kwargs={**trainer, "enable_checkpointing": False},
        )
        self.model.fit([TimeSeries.from_values(values.astype(np.float32)) for values in series()], verbose=False)
        self.network = self.model.model

    def save(self, path: Path) -> None:
        self.model.save(str(path), clean=True)

    def load(self, path: Path) -> Any:
        return BlockRNNModel.load(str(path)).model
