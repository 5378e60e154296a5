"""Logs and progress bars: what the last stage knows is shown, what another stage knows is not."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_sg import SyntheticGradients
from tests.blocks import plain
from tests.models import loader, make_trainer
from tests.ranks import run_ranks
from tests.two_stages import Two


def test_progress_bars_show_the_alignment() -> None:
    def work() -> dict[str, Any]:
        seen: dict[str, Any] = {}

        class Shows(lightning_callbacks.TQDMProgressBar):
            def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
                super().on_train_batch_end(trainer, pl_module, *rest)
                seen.update(self.get_metrics(trainer, pl_module))

        trainer = make_trainer(
            strategy="synthetic_gradients",
            devices=2,
            callbacks=[Shows(), SyntheticGradients()],
            log_every_n_steps=1,
            enable_progress_bar=True,
        )
        trainer.fit(plain(), loader())
        return seen

    shown, other = run_ranks(2, work)
    assert {"sg/cosine", "train_loss_step", "train_loss_epoch"} <= set(shown)
    assert -1 <= float(shown["sg/cosine"]) <= 1
    assert "sg/cosine" not in other


class LoggingInside(Two):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        h = torch.relu(self.first(batch[0]))
        self.log("activation", h.norm())
        loss = F.cross_entropy(self.second(self.cut(h)), batch[1])
        self.log_dict({"loss": loss})
        return loss


def test_a_value_of_another_stage_is_not_logged_and_it_is_said(tmp_path: Path) -> None:
    def work() -> Any:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            logger = CSVLogger(tmp_path)
            make_trainer(strategy="synthetic_gradients", devices=2, logger=logger, log_every_n_steps=1).fit(
                LoggingInside(), loader()
            )
        return [str(warning.message) for warning in caught]

    last, _first = run_ranks(2, work)
    assert any("'activation' is computed in another stage than stage 1 (rank 0)" in message for message in last)
    header = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    assert "loss" in header
    assert "activation" not in header
