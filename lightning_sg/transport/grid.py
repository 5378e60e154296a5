"""Which process holds which stages, and the process groups of replicas."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from lightning_sg.replicas import Replicas


@dataclass(frozen=True)
class ProcessGrid:
    """The processes of a split run: one row for each replica, one column for each place among the stages.

    The last stage has the lowest rank of its replica, so that the loss of replica 0 is on global rank 0.

    Attributes:
        stage_ranks: For each replica, the global ranks in the order of the stages.
        replica: The replica of this process.
        position: Its place in the order of the stages, 0 for the first.
        device: Its device.
        backend: The backend for tensors: ``"gloo"`` or ``"nccl"``.
        timeout: How many seconds a process waits for another.
        peers: The processes with the same stages in other replicas.
    """

    stage_ranks: tuple[tuple[int, ...], ...]
    replica: int
    position: int
    device: torch.device
    backend: str
    timeout: float
    peers: Replicas = Replicas()

    @classmethod
    def of(
        cls, rank: int, processes: int, replicas: int, device: torch.device, backend: str, timeout: float
    ) -> ProcessGrid:
        """Places the processes; :meth:`with_peers` makes the groups of replicas.

        Args:
            rank: This process's global rank.
            processes: The number of processes, a multiple of ``replicas``.
            replicas: The number of replicas.
            device: This process's device.
            backend: The backend for tensors.
            timeout: How many seconds a process waits for another.
        """
        stages = processes // replicas
        rows = tuple(tuple(range(first + stages - 1, first - 1, -1)) for first in range(0, processes, stages))
        replica, position = divmod(rank, stages)
        return cls(rows, replica, stages - 1 - position, device, backend, timeout)

    def with_peers(self) -> ProcessGrid:
        """Makes the process groups of the replicas. A collective of all processes."""
        if len(self.stage_ranks) == 1:
            return self
        limit = timedelta(seconds=self.timeout)
        # Every process takes part in making every group.
        peers = [_open_peers(list(column), self.replica, self.backend, limit) for column in zip(*self.stage_ranks)]
        return replace(self, peers=peers[self.position])

    @property
    def ranks(self) -> tuple[int, ...]:
        """The global ranks of this replica, in the order of the stages."""
        return self.stage_ranks[self.replica]

    @property
    def rank(self) -> int:
        """This process's global rank."""
        return self.ranks[self.position]

    @property
    def is_first(self) -> bool:
        """Whether this process holds the first stage."""
        return self.position == 0

    @property
    def is_last(self) -> bool:
        """Whether this process holds the last stage, where the loss is."""
        return self.position == len(self.ranks) - 1


def _open_peers(ranks: list[int], replica: int, backend: str, timeout: timedelta) -> Replicas:
    on_host = dist.new_group(ranks, backend="gloo", timeout=timeout)
    group = on_host if backend == "gloo" else dist.new_group(ranks, backend=backend, timeout=timeout)
    return Replicas(len(ranks), replica, group, on_host)


__all__ = ["ProcessGrid"]
