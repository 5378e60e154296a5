"""One training batch at one boundary, from the prediction of its activations until it is learned from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_sg.inputs.base import Activations


@dataclass
class InputRecord:
    """One training batch at one boundary.

    Attributes:
        step: How many training batches crossed the boundary before this one.
        features: What the boundary was told of the batch, float32, ``(N, ...)``.
        learns: Whether this batch is one to learn from.
        prediction: The predicted activations, used or not; ``None`` for none.
        activations: The true ones, float32, each ``(N, ...)``, once they are here.
        fetch: Brings them from another process, or ``None`` if they are here; blocks until then.
    """

    step: int
    features: Tensor
    learns: bool
    prediction: Activations | None = None
    activations: Activations | None = None
    fetch: Callable[[], Activations] | None = None

    def collect(self) -> None:
        """Waits for the true activations if they come from another process."""
        if self.fetch is not None:
            fetch, self.fetch = self.fetch, None
            self.activations = tuple(activation.detach().float() for activation in fetch())

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs of this batch."""
        return {name: value for name, value in self.__dict__.items() if name != "fetch"}


__all__ = ["InputRecord"]
