"""The input predictors of all boundaries, for the callback."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_sg.batch.features import features_of
from lightning_sg.inputs.settings import SyntheticInputs
from lightning_sg.inputs.trainer import InputTrainer
from lightning_sg.replicas import Replicas


class InputBoundaries:
    """The input predictors by boundary; without ``settings``, none, and every call does nothing.

    Args:
        settings: What the user said of synthetic inputs, or ``None``.
        delay: That of the gradient predictors.
    """

    def __init__(self, settings: SyntheticInputs | None, delay: int) -> None:
        self.settings = settings
        self.trainers: dict[str, InputTrainer] = {}
        self._features: Tensor | None = None
        self._delay = delay
        self._restored: dict[str, Any] = {}

    def install(self, names: Sequence[str], seed: int, replicas: Replicas) -> None:
        """Makes an input predictor for each boundary, from a checkpoint where one was loaded."""
        if self.settings is None:
            return
        self.trainers = {
            name: InputTrainer(name, self.settings, delay=self._delay, seed=seed, replicas=replicas) for name in names
        }
        restored, self._restored = self._restored, {}
        self._load(restored)

    def follow(self, trainer: pl.Trainer) -> None:
        """Shows what they do to the trainer's profiler."""
        for trained in self.trainers.values():
            trained.profile = trainer.profiler.profile  # type: ignore[attr-defined]

    def begin(self, batch: Any) -> None:
        """A training batch begins."""
        self._features = None if self.settings is None else features_of(batch, self.settings.source)

    @property
    def of_batch(self) -> Tensor:
        """What the current batch's activations are predicted from."""
        assert self._features is not None
        return self._features

    def end(self, *, check: bool) -> None:
        """It is over; ``check`` asks devices whether predictions were finite."""
        self._features = None
        for trained in self.trainers.values() if check else ():
            trained.check_finite()

    def add_figures(self, figures: dict[str, dict[str, Tensor]]) -> None:
        """Adds this process's figures to those of the gradient predictors, by boundary."""
        for name, trained in self.trainers.items():
            figures.setdefault(name, {}).update(trained.take_figures())

    def state_dict(self, owns: Callable[[str], bool]) -> dict[str, Any]:
        """The states by boundary of those that ``owns`` says are this process's."""
        if not self.trainers:
            return self._restored
        return {name: trained.state_dict() for name, trained in self.trainers.items() if owns(name)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`; a boundary that the saved run did not have starts afresh."""
        if self.settings is not None and not self.trainers:
            self._restored = state
        elif self.settings is not None:
            self._load(state)
        elif state:
            rank_zero_warn("The checkpoint has input predictors, which SyntheticGradients(inputs=None) leaves aside.")

    def _load(self, states: dict[str, Any]) -> None:
        for name, state in states.items():
            if name in self.trainers:
                self.trainers[name].load_state_dict(state)
            else:
                rank_zero_warn(
                    f"The checkpoint has an input predictor for boundary '{name}', which this model has not."
                )


__all__ = ["InputBoundaries"]
