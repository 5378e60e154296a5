"""Follows a training step without running it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_sg.boundary import Boundaries
from lightning_sg.partition import Trace
from lightning_sg.partition.step import call_training_step, trace_step


def traced(module: pl.LightningModule, batch: Any, cuts: Sequence[str] | None = None) -> Trace:
    """The trace of a step on a batch, cut after submodules of these names, or at the module's own boundaries."""
    boundaries = Boundaries(module, cuts)
    try:
        step = partial(call_training_step, module, batch, 0)
        return trace_step(module, boundaries.sites, step, torch.device("cpu"), batch=batch)
    finally:
        boundaries.remove()
