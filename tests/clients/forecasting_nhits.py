"""pytorch-forecasting's N-HiTS: blocks that each forecast a part, targets with weights beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from pytorch_forecasting import NHiTS, TimeSeriesDataSet

from tests.clients.client import Client
from tests.clients.series import SEASON, table


class NHits(Client):
    """N-HiTS, cut after the first of its three blocks."""

    boundaries = ("model.blocks.0",)
    context = 'batch[0]["decoder_target"]'
    lightning = pl

    def __init__(self) -> None:
        self.data = TimeSeriesDataSet(
            table(),
            time_idx="step",
            target="value",
            group_ids=["group"],
            max_encoder_length=2 * SEASON,
            max_prediction_length=6,
            time_varying_unknown_reals=["value"],
        )

    def module(self) -> Any:
        return NHiTS.from_dataset(self.data, hidden_size=32, learning_rate=1e-3, dropout=0.0)

    def loader(self) -> Any:
        return self.data.to_dataloader(train=True, batch_size=16)

    def validation(self) -> Any:
        return self.data.to_dataloader(train=False, batch_size=64)

    def load(self, path: Path) -> Any:
        return NHiTS.load_from_checkpoint(path)
