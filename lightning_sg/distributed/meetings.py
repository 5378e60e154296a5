"""What the stages of one replica do together: meetings over the links between them."""

from __future__ import annotations

from typing import Any, TypeVar

from lightning_sg.distributed.status import ProcessStatus
from lightning_sg.transport import Chain

Key = TypeVar("Key")


class StageMeetings:
    """The meetings of this process with the other stages; none after it has failed.

    Attributes:
        chain: The links over which they meet.

    Args:
        chain: See above.
        status: Whether this process has failed.
    """

    def __init__(self, chain: Chain, status: ProcessStatus) -> None:
        self.chain = chain
        self._status = status

    def gather(self, what: str, own: Any) -> list[Any]:
        """See :meth:`Chain.gather`."""
        with self._status.meeting(what):
            return self.chain.gather(what, own)

    def union(self, what: str, own: dict[Key, Any]) -> dict[Key, Any]:
        """The union of the stages' disjoint dicts in the last stage; elsewhere a part of it."""
        with self._status.meeting(what):
            return {key: value for part in self.chain.collect(what, own) for key, value in part.items()}


__all__ = ["StageMeetings"]
