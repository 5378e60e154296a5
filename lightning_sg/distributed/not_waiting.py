"""Saves predictors without the targets and activations that are still under way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from lightning_sg.inputs.record import ActivationsAtHand
from lightning_sg.inputs.trainer import InputTrainer
from lightning_sg.training.base import BoundaryTrainer
from lightning_sg.training.targets import TargetsOfBackwardPass


@contextmanager
def not_waiting(trainers: Iterable[BoundaryTrainer], inputs: Iterable[InputTrainer]) -> Iterator[None]:
    """While entered, trainers do with the targets and activations that they have."""
    with ExitStack() as stack:
        for trainer in trainers:
            stack.callback(setattr, trainer, "targets", trainer.targets)
            trainer.targets = TargetsOfBackwardPass()
        for each in inputs:
            stack.callback(setattr, each, "source", each.source)
            each.source = ActivationsAtHand()
        yield


__all__ = ["not_waiting"]
