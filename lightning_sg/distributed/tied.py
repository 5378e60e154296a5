"""Weights that stages on several processes use: each has a copy, and they stay in step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_sg.distributed.data_parallel import DataParallel
from lightning_sg.distributed.status import ProcessStatus
from lightning_sg.partition.placement import Placement
from lightning_sg.transport import ProcessGrid


class SharedWeights(Protocol):
    """What happens to the gradients of weights that several processes use.

    Attributes:
        borrowed: The ids of the copies that are another process's to save, and to count.
        synchronized: Whether there are any, for which every process must go backward at every batch.
    """

    borrowed: set[int]
    synchronized: bool

    def summing(self, data_parallel: DataParallel) -> AbstractContextManager[None]:
        """Around a backward pass: copies get the sum of their gradients."""


class NoTiedWeights:
    """No weight is used by several processes."""

    synchronized = False

    def __init__(self) -> None:
        self.borrowed: set[int] = set()

    def summing(self, data_parallel: DataParallel) -> AbstractContextManager[None]:
        """Does nothing."""
        return nullcontext()


class TiedWeights:
    """The copies in this process, which get the sum of the gradients of all.

    As one weight in one process would. The optimizers of the processes then take the same steps; but each waits for the
    others in every backward pass, from the last stage that uses the weight to the first.

    Args:
        module: The user's module.
        placement: Which processes use which weights. All processes must make this together.
        grid: The processes.
        status: Names this process in errors.
    """

    synchronized = True

    def __init__(self, module: nn.Module, placement: Placement, grid: ProcessGrid, status: ProcessStatus) -> None:
        self._grid = grid
        self._status = status
        groups = _open_groups(placement, grid)
        self._copies: list[tuple[nn.Parameter, Any]] = []
        self.borrowed: set[int] = set()
        for name, parameter in module.named_parameters():
            group = groups.get(placement.tied.get(name, ()))
            if group is not None:
                # Without a seed every process has made weights of its own.
                dist.broadcast(parameter.data, src=grid.ranks[placement.owner[name]], group=group)
                self._copies.append((parameter, group))
                if placement.owner[name] != grid.position:
                    self.borrowed.add(id(parameter))

    @property
    def _trained(self) -> list[tuple[nn.Parameter, Any]]:
        return [(copy, group) for copy, group in self._copies if copy.requires_grad]  # callbacks freeze and thaw

    @contextmanager
    def summing(self, data_parallel: DataParallel) -> Iterator[None]:
        """Around a backward pass: what it adds to the gradient of a copy, all copies add up. A collective."""
        before = [None if copy.grad is None else copy.grad.to_dense().clone() for copy, _group in self._trained]
        if not data_parallel.accumulates:
            # The backward pass averages what was accumulated, too.
            self._grid.peers.average_([gradient for gradient in before if gradient is not None])
        yield
        with self._status.meeting("adding up the gradients of a tied weight"):
            for (copy, group), old in zip(self._trained, before):
                new = _dense_gradient(copy)
                added = new if old is None else new - old
                dist.all_reduce(added, group=group)
                copy.grad = added if old is None else old + added


def _open_groups(placement: Placement, grid: ProcessGrid) -> dict[tuple[int, ...], Any]:
    """The process group of this process's copies, by the places of the processes that use them."""
    groups: dict[tuple[int, ...], Any] = {}
    for users in dict.fromkeys(placement.tied.values()):  # every process takes part in making every group
        for replica, ranks in enumerate(grid.stage_ranks):
            members = [ranks[user] for user in users]
            group = dist.new_group(members, backend=grid.backend, timeout=timedelta(seconds=grid.timeout))
            if replica == grid.replica and grid.position in users:
                groups[users] = group
    return groups


def _dense_gradient(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    return torch.zeros_like(parameter) if gradient is None else gradient.to_dense().clone()


__all__ = ["NoTiedWeights", "SharedWeights", "TiedWeights"]
