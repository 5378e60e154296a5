"""One training batch at one boundary, from its prediction to its true activations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from lightning_sg.inputs.base import Activations


@dataclass
class InputRecord:
    """One training batch at one boundary.

    Attributes:
        step: How many training batches crossed the boundary before this one.
        features: What the predictor sees of the batch, float32, ``(N, ...)``.
        learns: Whether the predictor learns from this batch.
        prediction: The predicted activations, whether used or not; ``None`` if there are none.
        activations: The true activations, float32, each ``(N, ...)``, once they have arrived.
    """

    step: int
    features: Tensor
    learns: bool
    prediction: Activations | None = None
    activations: Activations | None = None

    def take(self, activations: Iterable[Tensor]) -> None:
        """Stores the true activations."""
        self.activations = tuple(activation.detach().float() for activation in activations)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs of this batch."""
        return dict(self.__dict__)


class ActivationSource(Protocol):
    """Supplies the true activations of one boundary, waiting for them if necessary."""

    def activations(self, record: InputRecord) -> None:
        """Stores the true activations in ``record``, unless it has them."""


class ActivationsAtHand:
    """The source for records that get their activations when they are made."""

    def activations(self, record: InputRecord) -> None:
        """Does nothing."""


__all__ = ["ActivationSource", "ActivationsAtHand", "InputRecord"]
