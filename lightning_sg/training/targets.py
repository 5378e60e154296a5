"""Where the targets and exact gradients of a boundary come from."""

from __future__ import annotations

from typing import Protocol

from lightning_sg.training.record import Record


class TargetSource(Protocol):
    """Brings targets and exact gradients into the records of one boundary, waiting for them if need be."""

    def target(self, record: Record) -> None:
        """Brings the target, once for each record."""

    def exact(self, record: Record) -> None:
        """Brings the exact gradient, once for each record; its target is here already."""


class TargetsOfBackwardPass:
    """The source where both stages are in this process: the backward pass itself brings targets into the records."""

    def target(self, record: Record) -> None:
        """Has nothing to do."""

    def exact(self, record: Record) -> None:
        """Has nothing to do."""


__all__ = ["TargetSource", "TargetsOfBackwardPass"]
