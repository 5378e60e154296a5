"""The input predictors of all boundaries of one module."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from lightning_sg.batch.features import features_of
from lightning_sg.inputs.settings import SyntheticInputs
from lightning_sg.inputs.trainer import InputTrainer
from lightning_sg.lightning_api import rank_zero_warn
from lightning_sg.replicas import Replicas
from lightning_sg.training.base import Profile
from lightning_sg.training.resumed import warn_of_fresh


class InputBoundaries:
    """The input predictors by boundary; none without ``settings``.

    Args:
        settings: The user's options for synthetic inputs, or ``None``.
        delay: The delay of the gradient predictors, which input predictors share.
    """

    def __init__(self, settings: SyntheticInputs | None, delay: int) -> None:
        self.settings = settings
        self.trainers: dict[str, InputTrainer] = {}
        self._delay = delay
        self._restored: dict[str, Any] = {}

    def install(self, names: Iterable[str], seed: int, replicas: Replicas) -> None:
        """Makes an input predictor for each boundary, and restores it if a checkpoint was loaded."""
        if self.settings is None:
            return
        self.trainers = {
            name: InputTrainer(name, self.settings, delay=self._delay, seed=seed, replicas=replicas) for name in names
        }
        restored, self._restored = self._restored, {}
        if restored:
            self._load(restored)

    def show_to(self, profile: Profile) -> None:
        """Shows the predictors' actions to the trainer's profiler."""
        for trainer in self.trainers.values():
            trainer.profile = profile

    def features(self, batch: Any) -> Tensor | None:
        """What the activations of a batch are predicted from; ``None`` without synthetic inputs."""
        return None if self.settings is None else features_of(batch, self.settings.source)

    def check_finite(self) -> None:
        """See :meth:`InputTrainer.check_finite`."""
        for trainer in self.trainers.values():
            trainer.check_finite()

    def state_dict(self, owns: Callable[[str], bool]) -> dict[str, Any]:
        """The states, by boundary, of the input predictors that this process owns."""
        if not self.trainers:
            return self._restored
        return {name: trainer.state_dict() for name, trainer in self.trainers.items() if owns(name)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`; a boundary that the saved run did not have starts afresh."""
        if self.settings is not None and not self.trainers:
            self._restored = state
        elif self.settings is not None:
            self._load(state)
        elif state:
            rank_zero_warn(
                f"The checkpoint has input predictors for boundaries {sorted(state)}, which "
                "SyntheticGradients(inputs=None) ignores."
            )

    def _load(self, states: dict[str, Any]) -> None:
        fresh = self.trainers.keys() - states.keys()
        warn_of_fresh(fresh, "the checkpoint has no input predictors for these boundaries")
        for name, state in states.items():
            if name in self.trainers:
                self.trainers[name].load_state_dict(state)
            else:
                rank_zero_warn(
                    f"The checkpoint has an input predictor for boundary '{name}', which this model does not have: it "
                    "is dropped."
                )


__all__ = ["InputBoundaries"]
