"""Runs the same training in one process or in several."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_sg import SyntheticGradients
from tests.models import make_trainer
from tests.ranks import run_ranks


def trainer_for(devices: int, callbacks: list[Callback] | None = None, **arguments: Any) -> pl.Trainer:
    if devices > 1:
        arguments["strategy"] = "synthetic_gradients"
    return make_trainer(devices=devices, callbacks=callbacks or [SyntheticGradients()], **arguments)


def everywhere(devices: int, work: Any) -> list[Any]:
    """Runs ``work(devices)`` in one process or in several."""
    return run_ranks(devices, lambda: work(devices)) if devices > 1 else [work(1)]
