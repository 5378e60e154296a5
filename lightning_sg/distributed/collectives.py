"""What Lightning asks of all processes together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_sg._compat import reduce_over
from lightning_sg.distributed.meetings import StageMeetings
from lightning_sg.distributed.status import ProcessStatus
from lightning_sg.partition.fakes import is_fake
from lightning_sg.replicas import Replicas
from lightning_sg.transport import ProcessGrid


class Collectives(Protocol):
    """Lightning's collectives, in its own words."""

    def barrier(self, name: str | None) -> None:
        """Waits for all processes."""

    def broadcast(self, value: Any, src: int) -> Any:
        """Sends an object from one process to all."""

    def reduce(self, value: Any, group: Any, reduce_op: Any) -> Any:
        """Reduces a tensor over the replicas, among the processes with the same stages."""

    def all_gather(self, tensor: Tensor, group: Any, gather: Callable[[Any], Tensor], *, sync_grads: bool) -> Tensor:
        """Gathers a tensor from the replicas: ``(replicas, ...)``.

        Args:
            tensor: The tensor.
            group: The process group.
            gather: Gathers it in a group.
            sync_grads: Whether gradients flow back to the process that each part comes from.
        """

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

    def all_gather(self, tensor: Tensor, group: Any, gather: Callable[[Any], Tensor], *, sync_grads: bool) -> Tensor:
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

    def all_gather(self, tensor: Tensor, group: Any, gather: Callable[[Any], Tensor], *, sync_grads: bool) -> Tensor:
        """See :meth:`Collectives.all_gather`."""
        peers = self._grid.peers
        if peers.count == 1:
            return tensor
        if is_fake(tensor):  # a trace, or code behind a stage's last boundary
            return tensor.unsqueeze(0).expand(peers.count, *tensor.shape)
        everyone = group is None or group is dist.group.WORLD  # what `LightningModule.all_gather` makes of no group
        with self._status.meeting("gathering a value"):
            if everyone and sync_grads:
                gathered: Tensor = _Gathered.apply(tensor, peers)
                return gathered
            return gather(peers.group if everyone else group)

    def vote(self, decision: bool, *, all_of_them: bool) -> bool:
        """See :meth:`Collectives.vote`."""
        votes = self._meetings.gather("vote", bool(decision))
        with self._status.meeting("vote"):
            if all_of_them:
                return not self._grid.peers.any(not all(votes))
            return self._grid.peers.any(any(votes))


class _Gathered(torch.autograd.Function):
    """Gathers from the replicas, and adds up the gradients; torch's own takes ranks in a group for global ones."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, peers: Replicas) -> Tensor:
        ctx.peers = peers
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(peers.count)]
        dist.all_gather(parts, tensor.contiguous(), group=peers.group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.peers.group)
        return gradient[ctx.peers.index], None


__all__ = ["Collectives", "GridCollectives", "OneProcessCollectives"]
