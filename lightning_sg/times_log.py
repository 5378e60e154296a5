"""Logs the time: seconds since training began, milliseconds a step, and how much of it processes wait."""

from __future__ import annotations

import dataclasses
import statistics
from collections import deque
from collections.abc import Collection

import torch

from lightning_sg.lightning_api import pl
from lightning_sg.past_log import to_loggers
from lightning_sg.runtime import Metrics
from lightning_sg.session import Session
from lightning_sg.step_clock import KEPT, Shares, StepClock

#: Begins the names under which shares of time travel with the metrics of a boundary.
_PREFIX = "time."
_KINDS = tuple(field.name for field in dataclasses.fields(Shares))


class TimesLog:
    """Brings the times of all processes of a replica to the loggers.

    Times are never equal in two runs, so they go to the loggers alone: ``trainer.callback_metrics`` stays the same
    however the stages are placed.
    """

    def __init__(self) -> None:
        self._others: dict[str, deque[Shares]] = {}

    def begin(self, clock: StepClock) -> None:
        """Training begins."""
        self._others = {}
        clock.begin()

    def joined(self, metrics: Metrics, session: Session, clock: StepClock) -> Metrics:
        """The metrics of this process with its times, at the boundary where its stages end; none where the loss is."""
        ends = [name for name in session.watched.order if session.ownership.owns(name)]
        if session.ownership.has_loss or not ends or not clock.fresh.steps:
            return metrics
        shares = clock.take().shares
        if shares is not None:
            times = {_PREFIX + kind: torch.tensor(getattr(shares, kind)) for kind in _KINDS}
            metrics[ends[-1]] = {**metrics.get(ends[-1], {}), **times}
        return metrics

    def take(self, metrics: Metrics) -> Metrics:
        """Takes the times out of what has come from other processes; returns the rest."""
        for name, values in metrics.items():
            if _PREFIX + _KINDS[0] in values:
                shares = Shares(*(float(values.pop(_PREFIX + kind)) for kind in _KINDS))
                self._others.setdefault(name, deque(maxlen=KEPT)).append(shares)
        return metrics

    def write(self, trainer: pl.Trainer, clock: StepClock) -> dict[str, float]:
        """Logs the time of the steps since it was last logged; returns it."""
        spent = clock.take()
        shares = spent.shares
        if not trainer.loggers or shares is None:
            return {}
        values = {"sg/seconds": clock.seconds, "sg/step_ms": 1000 * spent.whole / spent.steps}
        if self._others:
            waiting = [shares.waiting, *(each[-1].waiting for each in self._others.values())]
            values["sg/waiting"] = statistics.fmean(waiting)
        to_loggers(trainer, values)
        return values

    def shares(self, clock: StepClock) -> dict[str, Shares]:
        """How each process has spent its time, the first stage's first: by the boundary at its end, ``""`` for none."""
        found = {name: _mean(each) for name, each in self._others.items()}
        own = clock.spent.shares
        return found if own is None else {**found, "": own}


def _mean(shares: Collection[Shares]) -> Shares:
    return Shares(*(statistics.fmean(getattr(each, kind) for each in shares) for kind in _KINDS))


__all__ = ["TimesLog"]
