"""Writes values to a run's loggers beside Lightning's own log, which would repeat or aggregate them."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_sg._compat import logged_step
from lightning_sg.lightning_api import pl


def to_loggers(trainer: pl.Trainer, values: Mapping[str, float]) -> None:
    """Writes values under the step that Lightning gives to what the current batch logs."""
    for logger in trainer.loggers:  # they write on rank zero alone
        logger.log_metrics(dict(values), step=logged_step(trainer))


__all__ = ["to_loggers"]
