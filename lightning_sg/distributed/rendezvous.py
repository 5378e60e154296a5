"""Where the processes of a split run meet first: the store of the run, and torch's process group."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from datetime import timedelta
from enum import IntEnum
from typing import TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment

from lightning_sg._compat import PrefixStore, Store, default_store, init_dist_connection
from lightning_sg.errors import StageLostError
from lightning_sg.transport import Chain, Place, ProcessGrid, RunStore, Watch, call_roll, interruptible, open_chain
from lightning_sg.transport.endpoint import interface_of, own_address
from lightning_sg.transport.words import first_line

Result = TypeVar("Result")


class Step(IntEnum):
    """How far a process has come at start-up."""

    CALLED = 0
    IN_PROCESS_GROUP = 1
    IN_GRID = 2
    LINKED = 3


class Rendezvous:
    """Brings the processes together, once for all runs of this process.

    Args:
        environment: Knows where the processes meet, and which of them this is.
        processes: How many there are.
        timeout: How many seconds to wait for another.
    """

    _chains = itertools.count()  # every process opens its links equally often
    _run: RunStore | None = None

    def __init__(self, environment: ClusterEnvironment, processes: int, timeout: float) -> None:
        self._environment = environment
        self._processes = processes
        self._timeout = timeout

    def open_process_group(self, backend: str) -> None:
        """Waits for all processes, and opens torch's process group unless that has been done.

        Raises:
            StageLostError: If a process does not come.
        """
        if dist.is_initialized():
            return
        environment = self._environment
        place = Place.of(environment.main_address, environment.main_port, environment.global_rank(), self._processes)
        run = type(self)._run = call_roll(place, self._timeout)
        run.come_to(Step.CALLED)
        _choose_interface(run.keeper)
        limit, store = timedelta(seconds=self._timeout), PrefixStore("process group", run.store)
        self._together(
            lambda: init_dist_connection(environment, backend, timeout=limit, store=store), Step.IN_PROCESS_GROUP
        )

    def open_grid(self, replicas: int, device: torch.device, backend: str) -> ProcessGrid:
        """See :meth:`ProcessGrid.open`.

        Raises:
            StageLostError: If a process does not come.
        """
        return self._together(
            lambda: ProcessGrid.open(self._processes, replicas, device, backend, self._timeout),
            Step.IN_GRID,
        )

    def open_chain(self, grid: ProcessGrid, watch: Watch) -> Chain:
        """See :func:`open_chain`."""
        run = self.run
        chain = open_chain(grid, PrefixStore(f"chain {next(self._chains)}", run.store), watch)
        run.come_to(Step.LINKED)
        return chain

    @property
    def run(self) -> RunStore:
        """The store of the run; that of torch's process group, if somebody else has opened it."""
        if self._run is None:
            store = default_store()
            type(self)._run = RunStore(store, "", dist.get_rank(), self._processes, store)
        assert self._run is not None
        return self._run

    def _check_others(self) -> None:
        """Raises if another process has failed meanwhile."""
        for rank, reason in self.run.failed().items():
            raise StageLostError(
                f"rank {rank} failed at start-up: {reason}", f"rank {rank} failed at start-up: {reason}"
            )

    def _together(self, call: Callable[[], Result], step: Step) -> Result:
        """Does what all processes have to do together, and says who did not if it fails."""
        run = self.run
        try:
            result = interruptible(call, self._check_others)
        except StageLostError:
            raise
        except RuntimeError as error:
            run.fail(first_line(error))
            behind = [rank for rank in run.behind(step - 1) if rank != run.rank]
            who = f"rank{'s' * (len(behind) > 1)} {', '.join(map(str, behind))}" if behind else "another process"
            raise StageLostError(
                f"rank {run.rank}: the processes have found each other, but {who} did not come to the process group "
                f"within {self._timeout:g} s, or ended meanwhile ({first_line(error)}). Its own output says why.",
                f"{who} did not come to the process group.",
            ) from error
        run.come_to(step)
        return result


def _choose_interface(store: Store) -> None:
    """Has gloo listen where the other machines reach this one; it would go by what the host's own name resolves to."""
    interface = interface_of(own_address(store))
    if interface is not None and "GLOO_SOCKET_IFNAME" not in os.environ:
        os.environ["GLOO_SOCKET_IFNAME"] = interface


__all__ = ["Rendezvous"]
