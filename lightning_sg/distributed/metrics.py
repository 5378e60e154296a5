"""Brings the boundaries' metrics to the last stage, where the loggers are."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from lightning_sg.lightning_api import pl
from lightning_sg.runtime import Metrics

Value = TypeVar("Value")
Numbers = dict[str, dict[str, float]]


class MetricsRoute:
    """The metrics that pass through one process on their way downstream, with the activations.

    Args:
        is_last: Whether this is the last stage, where they are logged.
    """

    def __init__(self, *, is_last: bool) -> None:
        self._is_last = is_last
        self._arrived: Numbers = {}
        self._leaving: Numbers = {}

    def arrive(self, metrics: Numbers) -> None:
        """Takes the metrics that came with the activations of a batch."""
        self._arrived = _merged(self._arrived, metrics)

    def route(self, metrics: Metrics, trainer: pl.Trainer) -> Metrics:
        """Takes this process's metrics of a batch; returns those to log here."""
        arrived, self._arrived = self._arrived, {}
        own = {name: values for name, values in metrics.items() if values}
        if self._is_last:
            tensors = {name: {k: torch.tensor(v) for k, v in values.items()} for name, values in arrived.items()}
            return _merged(tensors, own)
        self._leaving = _merged(self._leaving, arrived)
        if _can_read(trainer):
            numbers = {name: {k: float(v) for k, v in values.items()} for name, values in own.items()}
            self._leaving = _merged(self._leaving, numbers)
        return {}

    def leave(self) -> Numbers:
        """What goes downstream with the next activations."""
        leaving, self._leaving = self._leaving, {}
        return leaving


def _can_read(trainer: Any) -> bool:
    """Whether the values may be read now: a device would stop, so only where they are logged."""
    on_host = trainer.strategy.root_device.type == "cpu"
    return bool(on_host or trainer.global_step % max(1, trainer.log_every_n_steps) == 0)


def _merged(metrics: dict[str, dict[str, Value]], more: dict[str, dict[str, Value]]) -> dict[str, dict[str, Value]]:
    """The metrics of both, by boundary: of one with a predictor on either side, two processes have some."""
    return {name: {**metrics.get(name, {}), **more.get(name, {})} for name in [*metrics, *more]}


__all__ = ["MetricsRoute"]
