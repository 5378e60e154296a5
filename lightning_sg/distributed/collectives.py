"""What Lightning asks of all processes together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_sg._compat import reduce_over
from lightning_sg.distributed.status import ProcessStatus
from lightning_sg.transport import ProcessGrid


class Collectives(Protocol):
    """Lightning's collectives, in its own words."""

    def barrier(self) -> None:
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

    def barrier(self) -> None:
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
        status: Names this process.
    """

    def __init__(self, grid: ProcessGrid, status: ProcessStatus) -> None:
        self._grid = grid
        self._status = status

    def barrier(self) -> None:
        """See :meth:`Collectives.barrier`."""
        with self._status.meeting("barrier"):
            dist.barrier(self._grid.world_group)

    def broadcast(self, value: Any, src: int) -> Any:
        """See :meth:`Collectives.broadcast`."""
        box = [value]
        with self._status.meeting("broadcast"):
            dist.broadcast_object_list(box, src, group=self._grid.world_group)
        return box[0]

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
        votes = torch.tensor(int(decision))
        with self._status.meeting("vote"):
            dist.all_reduce(votes, group=self._grid.world_group)
        return bool(votes == dist.get_world_size()) if all_of_them else bool(votes)


__all__ = ["Collectives", "GridCollectives", "OneProcessCollectives"]
