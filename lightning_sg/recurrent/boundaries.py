"""All boundaries in time of one module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sg._compat import tree_map_only
from lightning_sg.crossings.base import BatchContext
from lightning_sg.recurrent.auxiliary import Auxiliary
from lightning_sg.recurrent.crossing import TimeCrossing
from lightning_sg.recurrent.settings import ThroughTime
from lightning_sg.time_boundary import CutInTime, TimeBoundary, boundaries_in_time
from lightning_sg.training.base import BoundaryTrainer


class TimeCrossings:
    """The boundaries in time of a module and their predictors; none until :meth:`attach`.

    Attributes:
        trainers: The trainer that supplies each boundary's gradient, by name.
    """

    def __init__(self) -> None:
        self.trainers: dict[str, BoundaryTrainer] = {}
        self._boundaries: dict[str, CutInTime] = {}
        self._crossings: dict[str, TimeCrossing] = {}
        self._restored: Mapping[str, Any] = {}

    def attach(
        self,
        module: nn.Module,
        trainers: Mapping[str, BoundaryTrainer],
        auxiliaries: Callable[[str], Auxiliary | None],
        settings: ThroughTime,
    ) -> None:
        """Takes over the boundaries in time of ``module``.

        Args:
            module: The module.
            trainers: The trainers of these boundaries by name, perhaps among others.
            auxiliaries: Makes a boundary's auxiliary task, or ``None``, from the boundary's name.
            settings: The user's options.
        """
        self._boundaries = boundaries_in_time(module)
        self.trainers = {name: trainers[name] for name in self._boundaries}
        self._crossings = {}
        for name, boundary in self._boundaries.items():
            carries = isinstance(boundary, TimeBoundary)
            auxiliary = auxiliaries(name) if carries else None
            self._crossings[name] = TimeCrossing(name, trainers[name], settings, auxiliary, state=carries)
        self.install()

    def install(self) -> None:
        """Connects the predictors to the boundaries."""
        for name, boundary in self._boundaries.items():
            boundary.connect(self._crossings[name])

    def remove(self) -> None:
        """Disconnects the predictors: the boundaries hand on values, and no gradients."""
        for name, boundary in self._boundaries.items():
            self._crossings[name].end()
            boundary.connect(None)

    def begin(self, batch: BatchContext, device: torch.device) -> None:
        """Starts a training step; the first one restores the checkpoint."""
        restored, self._restored = self._restored, {}
        for name, state in restored.items():
            if name in self._boundaries:
                state = tree_map_only(Tensor, lambda tensor: tensor.to(device), state)
                self._boundaries[name].load(state["carried"])
                self._crossings[name].load_state_dict(state["learning"])
        for crossing in self._crossings.values():
            crossing.begin(batch)

    def begin_evaluation(self) -> None:
        """Starts an evaluation, which carries nothing over."""
        for boundary in self._boundaries.values():
            boundary.begin_evaluation()

    def here(self, *, split: bool) -> list[str]:
        """The boundaries whose state is in this process.

        Args:
            split: Whether the stages run in several processes; then a boundary is here if real tensors have reached it.
        """
        return [name for name, trainer in self.trainers.items() if not split or trainer.ready]

    def state_dict(self, names: Iterable[str]) -> dict[str, Any]:
        """What these boundaries carry, so that a run can resume in the middle of a sequence."""
        if self._restored:
            return dict(self._restored)
        states = {
            name: {"carried": self._boundaries[name].carried(), "learning": self._crossings[name].state_dict()}
            for name in names
        }
        saved: dict[str, Any] = tree_map_only(Tensor, lambda tensor: tensor.detach().cpu().clone(), states)
        return saved

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict` at the next training step."""
        self._restored = states


__all__ = ["TimeCrossings"]
