"""All boundaries in time of one module, for the callback."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sg._compat import tree_map_only
from lightning_sg.crossings.step import Step
from lightning_sg.recurrent.auxiliary import Auxiliary
from lightning_sg.recurrent.boundary import CutInTime, TimeBoundary, boundaries_in_time
from lightning_sg.recurrent.crossing import TimeCrossing
from lightning_sg.recurrent.settings import ThroughTime
from lightning_sg.training import PredictorTrainer


class TimeCrossings:
    """The boundaries in time of a module, with their predictors; none by default.

    Attributes:
        trainers: The predictors, by boundary.
    """

    def __init__(self) -> None:
        self.trainers: dict[str, PredictorTrainer] = {}
        self._boundaries: dict[str, CutInTime] = {}
        self._crossings: dict[str, TimeCrossing] = {}
        self._restored: Mapping[str, Any] = {}

    def attach(
        self,
        module: nn.Module,
        trainers: Mapping[str, PredictorTrainer],
        auxiliaries: Callable[[str], Auxiliary | None],
        step: Step,
        settings: ThroughTime,
    ) -> None:
        """Takes over the boundaries in time of ``module``."""
        self._boundaries = boundaries_in_time(module)
        self.trainers = {name: trainers[name] for name in self._boundaries}
        self._crossings = {}
        for name, boundary in self._boundaries.items():
            carries = isinstance(boundary, TimeBoundary)
            auxiliary = auxiliaries(name) if carries else None
            self._crossings[name] = TimeCrossing(name, trainers[name], step, settings, auxiliary, state=carries)
        self.install()

    def install(self) -> None:
        """Puts the predictors into the boundaries."""
        for name, boundary in self._boundaries.items():
            boundary.link(self._crossings[name])

    def remove(self) -> None:
        """Leaves the boundaries as they were: they hand values on, and no gradient."""
        for boundary in self._boundaries.values():
            boundary.link(None)

    def begin(self, device: torch.device) -> None:
        """A training step begins; what a checkpoint had is put back at the first."""
        restored, self._restored = self._restored, {}
        for name, state in restored.items():
            if name in self._boundaries:
                state = tree_map_only(Tensor, lambda tensor: tensor.to(device), state)
                self._boundaries[name].load(state["carried"])
                self._crossings[name].load_state_dict(state["learning"])

    def begin_evaluation(self) -> None:
        """An evaluation begins, with nothing carried into it."""
        for boundary in self._boundaries.values():
            boundary.begin_evaluation()

    def inject(self, loss: Tensor) -> None:
        """See :meth:`TimeCrossing.inject`."""
        for crossing in self._crossings.values():
            crossing.inject(loss)

    def learn(self) -> None:
        """See :meth:`TimeCrossing.learn`."""
        for crossing in self._crossings.values():
            crossing.learn()

    def end(self) -> None:
        """The step is over."""
        for crossing in self._crossings.values():
            crossing.end()

    def here(self, *, split: bool) -> list[str]:
        """The boundaries whose state is in this process.

        Args:
            split: Whether the stages are on several processes; then those that tensors with data have reached.
        """
        return [name for name, trainer in self.trainers.items() if not split or trainer.built]

    def state_dict(self, names: Iterable[str]) -> dict[str, Any]:
        """What is carried at these boundaries, for a resumed run that goes on in the middle of a sequence."""
        if self._restored:
            return dict(self._restored)
        states = {
            name: {"carried": self._boundaries[name].carried(), "learning": self._crossings[name].state_dict()}
            for name in names
        }
        saved: dict[str, Any] = tree_map_only(Tensor, lambda tensor: tensor.detach().cpu().clone(), states)
        return saved

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Keeps :meth:`state_dict` until the first step."""
        self._restored = states


__all__ = ["TimeCrossings"]
