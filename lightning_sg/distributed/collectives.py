"""What Lightning asks of all processes together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from lightning_sg._compat import reduce_over
from lightning_sg.distributed.meetings import StageMeetings
from lightning_sg.distributed.status import ProcessStatus
from lightning_sg.transport import ProcessGrid


class Collectives(Protocol):
    """Lightning's collectives, in its own words."""

    def barrier(self, name: str | None) -> None:
        """Waits for all processes."""

    def broadcast(self, value: Any, src: int) -> Any:
        """Sends an object from one process to all."""

    def reduce(self, value: Any, group: Any, reduce_op: Any) -> Any:
        """Reduces a tensor over the replicas, among the processes with the same stages."""

    def all_gather(self, tensor: Tensor, group: Any, gather: Callable[[Any], Tensor]) -> Tensor:
        """Gathers a tensor from the replicas: ``(replicas, ...)``."""

    def vote(self, decision: bool, *, all_of_them: bool) -> bool:
        """Asks all processes: whether all (or any) of them say yes."""


class OneProcessCollectives:
    """There is nobody else."""

    def barrier(self, name: str | None) -> None:
        """Does nothing."""

    def broadcast(self, value: Any, src: int) -> Any:
        """Returns the object."""
        return value

    def reduce(self, value: Any, group: Any, reduce_op: Any) -> Any:
        """Returns the tensor."""
        return value

    def all_gather(self, tensor: Tensor, group: Any, gather: Callable[[Any], Tensor]) -> Tensor:
        """Returns the tensor."""
        return tensor

    def vote(self, decision: bool, *, all_of_them: bool) -> bool:
        """Returns the decision."""
        return decision


class GridCollectives:
    """The collectives of a split run; errors name what the processes met for.

    Args:
        grid: The processes.
        meetings: The meetings of this replica's stages.
        status: Names this process.
    """

    def __init__(self, grid: ProcessGrid, meetings: StageMeetings, status: ProcessStatus) -> None:
        self._grid = grid
        self._meetings = meetings
        self._status = status

    def barrier(self, name: str | None) -> None:
        """See :meth:`Collectives.barrier`."""
        what = f"barrier {name or ''}".strip()
        self._meetings.gather(what, None)
        with self._status.meeting(what):
            self._grid.peers.any(False)

    def broadcast(self, value: Any, src: int) -> Any:
        """See :meth:`Collectives.broadcast`.

        Raises:
            SyntheticGradientsError: For an object that cannot be sent without a pickle.
        """
        grid = self._grid
        replica, row = next((index, row) for index, row in enumerate(grid.stage_ranks) if src in row)
        if replica == grid.replica:
            value = self._meetings.gather("broadcast", value if src == grid.rank else None)[row.index(src)]
        if grid.peers.count == 1:
            return value
        with self._status.meeting("broadcast"):
            return grid.peers.broadcast(value, replica)

    def reduce(self, value: Any, group: Any, reduce_op: Any) -> Any:
        """See :meth:`Collectives.reduce`."""
        peers = self._grid.peers
        if peers.count == 1 or not isinstance(value, Tensor):
            return value
        with self._status.meeting("reducing a value"):
            return reduce_over(value, peers.group if group is None else group, reduce_op=reduce_op)

    def all_gather(self, tensor: Tensor, group: Any, gather: Callable[[Any], Tensor]) -> Tensor:
        """See :meth:`Collectives.all_gather`."""
        peers = self._grid.peers
        if peers.count == 1:
            return tensor
        everyone = group is None or group is dist.group.WORLD  # what `LightningModule.all_gather` makes of no group
        with self._status.meeting("gathering a value"):
            return gather(peers.group if everyone else group)

    def vote(self, decision: bool, *, all_of_them: bool) -> bool:
        """See :meth:`Collectives.vote`."""
        votes = self._meetings.gather("vote", bool(decision))
        with self._status.meeting("vote"):
            if all_of_them:
                return not self._grid.peers.any(not all(votes))
            return self._grid.peers.any(any(votes))


__all__ = ["Collectives", "GridCollectives", "OneProcessCollectives"]
