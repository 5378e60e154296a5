"""Random numbers of the stages in one process: those that each has in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any

from lightning_sg.lightning_api import pl
from lightning_sg.partition.shadow import shadowed
from lightning_sg.passes import hearing_passes
from lightning_sg.rng import StepRandomness
from lightning_sg.session import Session
from lightning_sg.training.ruled import RuledBoundary

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class StageRandomness:
    """Gives each stage its random numbers in every step of a trainer, until :meth:`close`.

    A model without boundaries, or with the true gradient at each, draws as it does in plain training: there is nothing
    that is decoupled.

    Args:
        session: The training.
        trainer: Runs the steps.
    """

    def __init__(self, session: Session, trainer: pl.Trainer) -> None:
        self._session = session
        strategy = trainer.strategy
        self._randomness = StepRandomness(strategy.root_device)
        self._shadows = ExitStack()
        steps = [(strategy, name, self._with_numbers(name, getattr(strategy, name))) for name in _STEPS]
        self._shadows.enter_context(shadowed(steps))

    def close(self) -> None:
        """Lets steps draw from the generators as they are."""
        self._shadows.close()

    def _with_numbers(self, name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(step)
        def run(*args: Any, **kwargs: Any) -> Any:
            if not self._decouples:
                return step(*args, **kwargs)
            sites = self._session.boundaries.sites
            self._randomness.count(self._session.batches, training=name == "training_step")
            with self._randomness, hearing_passes(self._session.module, sites, self._randomness.next_stage):
                return step(*args, **kwargs)

        return run

    @property
    def _decouples(self) -> bool:
        trainers = self._session.trainers.values()
        return any(not (isinstance(trainer, RuledBoundary) and trainer.waits) for trainer in trainers)


__all__ = ["StageRandomness"]
