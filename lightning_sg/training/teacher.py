"""What the trainers of both kinds of predictors have: a name, a learner, and the figures of the last batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic

from torch import Tensor

from lightning_sg.replicas import Replicas
from lightning_sg.training.learner import Kind, Learner


class Teacher(Generic[Kind]):
    """Has one boundary's predictor learn from the batches that pass.

    Attributes:
        step: How many batches have passed.
        profile: Makes a context for an action, by the name under which profilers see it.

    Args:
        name: The boundary's name, for messages.
        learner: The predictor with its optimizer.
        delay: How many steps later than at once it learns.
        replicas: Those whose predictors at this boundary learn from all their batches together.
    """

    def __init__(self, name: str, learner: Learner[Kind], *, delay: int, replicas: Replicas) -> None:
        self.name = name
        self.delay = delay
        self.step = 0
        self.profile: Callable[[str], AbstractContextManager[Any]] = nullcontext
        self._learner = learner
        self._replicas = replicas
        self._figures: dict[str, Tensor] = {}

    @property
    def predictor(self) -> Kind:
        """The predictor, built once the first batch is known."""
        return self._learner.predictor

    @property
    def built(self) -> bool:
        """Whether the predictor has its parameters."""
        return self._learner.built

    def take_figures(self) -> dict[str, Tensor]:
        """The figures of the last batch learned from, once: scalars by name."""
        figures, self._figures = self._figures, {}
        return figures


__all__ = ["Teacher"]
