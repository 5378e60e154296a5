"""Where the processes of a split run meet first: the store of the run, and torch's process group."""

from __future__ import annotations

import atexit
import itertools
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch.distributed as dist

from lightning_sg._compat import PrefixStore, default_store, init_dist_connection
from lightning_sg.errors import StageLostError
from lightning_sg.lightning_api import ClusterEnvironment
from lightning_sg.transport import (
    Chain,
    ProcessGrid,
    RunStore,
    StoreAddress,
    Watch,
    call_roll,
    carry_between_devices,
    interruptible,
    open_chain,
)
from lightning_sg.transport.address import interface_of
from lightning_sg.transport.news import News
from lightning_sg.words import first_line

Result = TypeVar("Result")
_MOMENT = 0.3  # seconds in which the news of a failure comes


class Rendezvous:
    """Brings the processes together, once for all runs of this process.

    First all processes of this attempt are counted. Then neighbours connect, so that each sees when another is gone.
    Only then torch's process groups are opened, which would say nothing about who does not come.

    Attributes:
        is_first: Whether the links opened last are the first of this process.

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
        self.is_first = True

    def open_chain(self, grid: ProcessGrid, watch: Watch) -> Chain:
        """Waits for all processes, and connects with the neighbours.

        Raises:
            StageLostError: If a process does not come.
        """
        run, number = self._store(), next(self._chains)
        chain = open_chain(grid, PrefixStore(f"chain {number}", run.store), watch)
        chain.news = run
        self.is_first = number == 0
        if self.is_first and run.rank == 0 and not run.outlives and watch.takes_snapshots:
            run.open_to_others()
        return chain

    def open_process_group(self, backend: str, chain: Chain) -> None:
        """Opens torch's process group, unless somebody has.

        Raises:
            StageLostError: If a process does not come.
        """
        if dist.is_initialized():
            return
        run, limit = self._store(), timedelta(seconds=self._timeout)
        _choose_interface(chain.address)
        store = PrefixStore("process group", run.store)
        self._together(lambda: init_dist_connection(self._environment, backend, timeout=limit, store=store), chain)
        atexit.register(_leave_process_group)

    def open_groups(self, grid: ProcessGrid, chain: Chain) -> ProcessGrid:
        """See :meth:`ProcessGrid.with_peers` and :func:`carry_between_devices`.

        Returns:
            The grid with its peers.

        Raises:
            StageLostError: If a process does not come.
        """

        def call() -> ProcessGrid:
            carry_between_devices(grid, chain)
            return grid.with_peers()

        return self._together(call, chain)

    def _store(self) -> RunStore:
        """The store of the run; that of torch's process group, if somebody else has opened it."""
        if self._run is None:
            type(self)._run = self._found() if dist.is_initialized() else self._called()
        assert self._run is not None
        return self._run

    def _found(self) -> RunStore:
        store = default_store()
        return RunStore(store, "", dist.get_rank(), self._processes, store, outlives=True)

    def _called(self) -> RunStore:
        environment = self._environment
        rank = environment.global_rank()
        place = StoreAddress.of(environment.main_address, environment.main_port, rank, self._processes)
        return call_roll(place, self._timeout)

    def _together(self, call: Callable[[], Result], chain: Chain) -> Result:
        """Does what all processes have to do together, and says who did not if it fails."""
        with News(self._store()) as news:
            try:
                return interruptible(call, partial(self._check_others, chain, news), self._store().hang_up)
            except StageLostError as error:
                self._fail(chain, error.reason)
                raise
            except RuntimeError as error:
                time.sleep(_MOMENT)
                self._check_others(chain, news)  # who is lost says more than how it was noticed
                self._fail(chain, first_line(error))
                raise StageLostError(
                    f"rank {self._store().rank}: torch's process group could not be opened within {self._timeout:g} s "
                    f"({first_line(error)}). The output of the other processes says why."
                ) from error

    def _fail(self, chain: Chain, reason: str) -> None:
        chain.fail(reason)
        self._store().fail(reason)

    def _check_others(self, chain: Chain, news: News) -> None:
        """Raises if another process has failed meanwhile, or been silent for too long."""
        for link in chain.links:
            link.inbox.check_here(f"torch's process group ({self._processes} processes)")
        for rank, reason in news.failed.items():
            raise StageLostError(f"rank {rank} failed at start-up: {reason}")


def _choose_interface(address: str) -> None:
    """Has gloo listen where the other machines reach this one; it would go by what the host's own name resolves to."""
    interface = interface_of(address)
    if interface is not None and "GLOO_SOCKET_IFNAME" not in os.environ:
        os.environ["GLOO_SOCKET_IFNAME"] = interface


def leave_at_exit(chain: Chain) -> None:
    """Has the links say how this process ends: well, or by an error that none of Lightning's hooks has seen."""

    def leave() -> None:
        error = getattr(sys, "last_value", None)  # what Python has just printed
        if error is not None:
            chain.fail(f"{type(error).__name__}: {first_line(error)}")
        chain.leave()

    atexit.register(leave)


def _leave_process_group() -> None:
    """Ends gloo's threads while Python still is there.

    One that holds the last tensors of a transfer would otherwise release them when Python is gone, which aborts a
    process whose training went well.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


__all__ = ["Rendezvous", "leave_at_exit"]
