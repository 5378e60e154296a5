"""Whether a stage goes on without the answer of a neighbour that is silent, and for how long."""

from __future__ import annotations

import logging

from lightning_sg.distributed.status import ProcessStatus
from lightning_sg.transport import Link

_log = logging.getLogger(__name__)


class Absence:
    """The budget of one neighbour's absence.

    Attributes:
        total: How many batches have gone on without an answer, in all.

    Args:
        link: The connection to the neighbour, which knows how large it is.
        status: Names this process.
        answer: What is not waited for: "a target".
    """

    def __init__(self, link: Link, status: ProcessStatus, answer: str) -> None:
        self.total = 0
        self._away = link.away
        self._link = link
        self._status = status
        self._answer = answer
        self._batches = 0
        self._since: float | None = None

    def goes_on(self) -> bool:
        """Whether the neighbour is silent and the budget lasts; asked from time to time while waiting."""
        away = self._away
        if away is None or self._link.inbox.silent < away.patience:
            return False
        now = self._link.clock.now()
        self._since = now if self._since is None else self._since
        return self._batches < away.batches and now - self._since < away.seconds

    def went_on(self) -> None:
        """A batch goes on without an answer, as the neighbour is silent or was killed before it answered."""
        if not self._batches and self._since is not None:
            assert self._away is not None
            _log.warning(
                "%s: %s has been silent for %.1f s. This stage goes on without %s from it, for at most %d batches or "
                "%g s.",
                self._status.name,
                self._link.neighbour,
                self._link.inbox.silent,
                self._answer,
                self._away.batches,
                self._away.seconds,
            )
        self._batches += 1
        self.total += 1

    def answered(self) -> None:
        """An answer has come."""
        if self._batches:
            _log.warning(
                "%s: %s is back, after %d batches without %s from it.",
                self._status.name,
                self._link.neighbour,
                self._batches,
                self._answer,
            )
        self._batches, self._since = 0, None


__all__ = ["Absence"]
