"""Which parts of a training are this process's."""

from __future__ import annotations

from typing import Protocol

from lightning_sg.replicas import Replicas


class Ownership(Protocol):
    """Says what this process holds, trains and saves.

    Attributes:
        split: Whether the stages are on several processes.
        has_loss: Whether the model's own loss is computed in this process.
        replicas: The processes that hold the same stages in other replicas.
    """

    @property
    def split(self) -> bool: ...  # noqa: D102 (see above)

    @property
    def has_loss(self) -> bool: ...  # noqa: D102

    @property
    def replicas(self) -> Replicas: ...  # noqa: D102

    def holds(self, parameter: str) -> bool:
        """Whether the parameter of that name is trained in this process."""

    def owns(self, boundary: str) -> bool:
        """Whether the predictor of ``boundary`` lives in this process."""

    def owns_inputs(self, boundary: str) -> bool:
        """Whether the input predictor of ``boundary`` lives in this process."""


class OwnsAll:
    """Everything is in this process."""

    split = False
    has_loss = True
    replicas = Replicas()

    def holds(self, parameter: str) -> bool:
        """Always."""
        return True

    def owns(self, boundary: str) -> bool:
        """Always."""
        return True

    def owns_inputs(self, boundary: str) -> bool:
        """Always."""
        return True


__all__ = ["Ownership", "OwnsAll"]
