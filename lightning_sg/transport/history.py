"""What a process was told in meetings, so that a new process in its place can be told again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_sg.errors import SyntheticGradientsError

Told = tuple[str, list[Tensor]]


class History:
    """Records what gatherings brought, or answers from the record of a process that is gone.

    A new process goes through its script as the one before it did, and comes to the same meetings. The others do not
    meet again, so that it takes what they said from the record until it has come to where the record ends.

    Attributes:
        recording: Whether to record; for processes whose place a new one may take.
        replaying: Whether to answer from the record.
        rejoined: Whether this process has taken another's place.
        start: What was told before training began.
        told: What was told since the point that a new process would begin at.
    """

    def __init__(self) -> None:
        self.recording = False
        self.replaying = False
        self.rejoined = False
        self.start: list[Told] | None = None
        self.told: list[Told] = []
        self._to_come: list[Told] = []

    def note(self, what: str, brought: Sequence[Tensor]) -> None:
        """Records what a meeting brought."""
        if self.recording:
            self.told.append((what, list(brought)))

    def begin_anew(self) -> None:
        """A new process would begin here: what was told before is of no more use, but for the start."""
        if self.start is None:
            self.start = self.told
        self.told = []

    def restore_start(self, start: list[Told]) -> None:
        """This process takes the place of another: goes through the start first."""
        self.recording = self.replaying = self.rejoined = True
        self.start, self._to_come = start, list(start)

    def restore(self, told: list[Told]) -> None:
        """The start is over: goes through what was told since."""
        self.told, self._to_come = list(told), list(told)

    def again(self, what: str) -> list[Tensor] | None:
        """What this meeting brought, a packed object for each stage; ``None`` if it is not in the record.

        Raises:
            SyntheticGradientsError: If the new process has come to another meeting than the one before it.
        """
        for place, (name, brought) in enumerate(self._to_come):
            if name == what:
                del self._to_come[: place + 1]
                return brought
        if self.told:
            raise SyntheticGradientsError(
                f"This process was started anew and has come to '{what}', where the process before it was told "
                "nothing. It must be started with the same command, script and environment."
            )
        return None

    def state(self) -> dict[str, Any]:
        """All that was told, as plain values."""
        return {"start": self.start or [], "told": self.told}


__all__ = ["History"]
