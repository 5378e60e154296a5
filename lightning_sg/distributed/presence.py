"""Whether this process works on a batch, and what it does for a new process in its place."""

from __future__ import annotations

from typing import Protocol

from lightning_sg.lightning_api import pl


class Presence(Protocol):
    """What the runtime and the coordinator tell whoever keeps this process's place."""

    def skips(self, number: int) -> bool:
        """Whether this process does not work on a batch."""

    def training_starts(self, trainer: pl.Trainer) -> None:
        """Training starts."""

    def epoch_starts(self, trainer: pl.Trainer) -> None:
        """A training epoch starts."""

    def batch_ends(self, trainer: pl.Trainer) -> None:
        """A training batch is over, with all of its hooks."""


class AlwaysPresent:
    """No other process takes this one's place."""

    def skips(self, number: int) -> bool:
        """Whether this process does not work on a batch."""
        return False

    def training_starts(self, trainer: pl.Trainer) -> None:
        """Does nothing."""

    def epoch_starts(self, trainer: pl.Trainer) -> None:
        """Does nothing."""

    def batch_ends(self, trainer: pl.Trainer) -> None:
        """Does nothing."""


__all__ = ["AlwaysPresent", "Presence"]
