"""pytorch-forecasting's temporal fusion transformer: packed sequences, attention, and gates around all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet

from tests.clients.client import Client
from tests.clients.series import SEASON, table


class FusionTransformer(Client):
    """The temporal fusion transformer, cut where everything has come together, before its last layer."""

    boundaries = ("pre_output_gate_norm",)
    context = 'batch[0]["decoder_target"]'
    epochs = 3
    lightning = pl

    def __init__(self) -> None:
        self.data = TimeSeriesDataSet(
            table(),
            time_idx="step",
            target="value",
            group_ids=["group"],
            min_encoder_length=SEASON,
            max_encoder_length=2 * SEASON,
            max_prediction_length=6,
            static_categoricals=["group"],
            time_varying_known_reals=["step"],
            time_varying_unknown_reals=["value"],
        )

    def module(self) -> Any:
        return TemporalFusionTransformer.from_dataset(
            self.data, hidden_size=8, attention_head_size=1, hidden_continuous_size=4, dropout=0.0, learning_rate=1e-2
        )

    def loader(self) -> Any:
        return self.data.to_dataloader(train=True, batch_size=32)

    def load(self, path: Path) -> Any:
        return TemporalFusionTransformer.load_from_checkpoint(path)
